"""Processors, transformers' and a caller's own: exact per slot in every mode. Each sees the text before the token that
it judges, at its full length, and one that keeps a state is asked for every token that stays once, in order."""

import itertools
from typing import Any

import pytest
import torch
from oracles import COMBINATIONS, MASK, VOCABULARY, generators, texts, tiny
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hybrid import HybridForCausalLM
from hybrid.sampling import Request, decode_all
from hybrid.sampling.choosing.borrowed import BLIND, looks_back

PROMPT, NEW = 5, 14
IDS = torch.tensor(texts(2, [PROMPT, PROMPT], vocabulary=22))
WAYS: list[tuple[str, str, str, dict[str, Any]]] = [
    *((mode, clean, prediction, {}) for mode, clean, prediction in COMBINATIONS),
    ("speculative", "causal", "in_place", {"fused": True}), ("speculative", "causal", "next", {"drafts_per_round": 3}),
    ("block", "full", "in_place", {"cache": "dual"}), ("block", "full", "next", {"cache": "prefix"}),
    ("block", "causal", "in_place", {"steps_per_block": 2}), ("diffusion", "causal", "next", {"reveal": "ancestral"}),
    ("block", "causal", "in_place", {"sub_block_size": 2}), ("block", "block", "next", {"reveal": "entropy_bound"}),
]  # fmt: skip
ways = pytest.mark.parametrize(("mode", "clean", "prediction", "more"), WAYS)


class Places(LogitsProcessor):
    """Even places one half of the vocabulary, odd ones the other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        half = torch.arange(scores.shape[1]) % 2 == input_ids.shape[1] % 2
        return scores.masked_fill(half, -torch.inf)


class Follows(LogitsProcessor):
    """A grammar: what may come depends on the token before, and on the sum of the two before that."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert (input_ids[:, PROMPT:] != MASK).all(), "the text before a slot was not known"
        allowed = torch.arange(scores.shape[1])[None] % 3 == (input_ids[:, -1:] + input_ids[:, -3:-1].sum(1, True)) % 3
        return scores.masked_fill(~allowed, -torch.inf)


class Counts(LogitsProcessor):
    """Keeps a state: how long the texts were for which it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.asked.append(input_ids.shape[1])
        return scores.index_fill(1, torch.tensor([len(self.asked) % 22]), -torch.inf)


def no_last(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores.scatter(1, input_ids[:, -1:], -torch.inf)


END = 7
# What these do depends on the scores, which nobody knows afterwards.
BY_SCORES = (
    "finite", "normalised", "temperature", "repetition", "bias", "decay", "min p", "top k", "top p", "top h", "typical",
    "epsilon", "eta",
)  # fmt: skip
KINDS: dict[str, Any] = {
    "places": Places, "follows": Follows, "a function": lambda: no_last,
    "no repeats": lambda: NoRepeatNGramLogitsProcessor(2),
    "repetition": lambda: RepetitionPenaltyLogitsProcessor(50.0),
    "bad words": lambda: NoBadWordsLogitsProcessor([[3], [4, 5], [19, 19], [1, 2, 3]], eos_token_id=None),
    "bias": lambda: SequenceBiasLogitsProcessor({(19, 19): -100.0, (20,): -3.0}),
    "suppress": lambda: SuppressTokensLogitsProcessor([19, 20]),
    "suppress first": lambda: SuppressTokensAtBeginLogitsProcessor([*range(0, 20)], PROMPT),
    "min new": lambda: MinNewTokensLengthLogitsProcessor(PROMPT, 6, END),
    "min length": lambda: MinLengthLogitsProcessor(PROMPT + 6, END),
    "decay": lambda: ExponentialDecayLengthPenalty((3, 2.0), END, PROMPT),
    "forced end": lambda: ForcedEOSTokenLogitsProcessor(PROMPT + NEW, END),
    "forced bos": lambda: ForcedBOSTokenLogitsProcessor(3),
    "encoder": lambda: EncoderNoRepeatNGramLogitsProcessor(2, IDS[:1]),
    "prefix": lambda: PrefixConstrainedLogitsProcessor(lambda _batch, ids: [int(ids[-1] + 1) % 22, len(ids) % 22], 1),
    "finite": InfNanRemoveLogitsProcessor, "normalised": LogitNormalization,
    "temperature": lambda: TemperatureLogitsWarper(0.5), "top k": lambda: TopKLogitsWarper(3),
    "top p": lambda: TopPLogitsWarper(0.5), "min p": lambda: MinPLogitsWarper(0.2),
    "top h": lambda: TopHLogitsWarper(0.5),
    "typical": lambda: TypicalLogitsWarper(0.5), "epsilon": lambda: EpsilonLogitsWarper(0.1),
    "eta": lambda: EtaLogitsWarper(0.1),
}  # fmt: skip


def model_for(clean: str, prediction: str) -> HybridForCausalLM:
    return tiny(2, peaked=0.6, clean_attention=clean, diffusion_prediction=prediction)


def generated(model: HybridForCausalLM, processor: Any, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "output_scores": True, "return_dict_in_generate": True, **options}
    return model.generate(ids, logits_processor=[processor], generator=generators(len(ids)), **options)


# Each kind in every third way at once, one of two of them sampled; all of it where there is time.
CASES = [
    pytest.param(name, *way, sampled, marks=[] if (i + j) % 6 == 3 * sampled else [pytest.mark.slow])
    for i, name in enumerate(KINDS)
    for j, way in enumerate(WAYS)
    for sampled in (False, True)
]


@pytest.mark.parametrize(("name", "mode", "clean", "prediction", "more", "sampled"), CASES)
def test_every_processor_holds_at_every_slot(
    name: str, mode: str, clean: str, prediction: str, more: dict[str, Any], sampled: bool
) -> None:
    """By the text that came out, read from its beginning: no token is one that its own past forbids."""
    model = model_for(clean, prediction)
    options: dict[str, Any] = {"mode": mode, **more, **({"do_sample": True} if sampled else {})}
    out = generated(model, KINDS[name](), IDS, **options)
    for row in range(len(IDS)):
        text, fresh = out.sequences[row : row + 1], KINDS[name]()
        for i in range(NEW):
            end, token = PROMPT + i, text[0, PROMPT + i]
            scores = out.scores[i][row : row + 1]
            if name not in BY_SCORES:
                flat = torch.zeros(1, VOCABULARY).index_fill(1, torch.tensor([MASK]), -torch.inf)
                judged = fresh(text[:, :end], flat)
                assert judged[0, token].isfinite(), f"{text[0].tolist()} at {end}"
                assert (judged.isfinite() | ~scores.isfinite()).all()  # and what was forbidden was so at the time
            assert sampled or scores[0, token] == scores.max()
    if name == "no repeats":
        for row in out.sequences.tolist():
            pairs = list(zip(row[PROMPT:], row[PROMPT + 1 :], strict=False))
            assert len(set(pairs)) == len(pairs)


@ways
def test_a_penalty_sees_the_whole_text_before(mode: str, clean: str, prediction: str, more: dict[str, Any]) -> None:
    """So strong that nothing comes twice before all has come once."""
    out = generated(model_for(clean, prediction), RepetitionPenaltyLogitsProcessor(1e6), IDS[:, :2], mode=mode, **more)
    for number, row in enumerate(out.sequences.tolist()):
        for i in range(2, 2 + NEW):
            score = out.scores[i - 2][number, row[i]]
            assert (0 <= score < 1e-3 or score < -1e3) == (row[i] in row[:i])


@pytest.mark.one_in(2)
@ways
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_end_may_come_from_the_asked_for_token_on(
    count: int, mode: str, clean: str, prediction: str, more: dict[str, Any]
) -> None:
    """min_new_tokens: not before, and at once there, in the first window as in the last."""
    model = model_for(clean, prediction)

    def prefers(_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, torch.tensor([END]), torch.full((len(scores), 1), 50.0, dtype=scores.dtype))

    out = model.generate(
        IDS, mode=mode, max_new_tokens=NEW, min_new_tokens=count, eos_token_id=END, logits_processor=[prefers],
        generator=generators(2), return_dict_in_generate=True, **more,
    )  # fmt: skip
    assert [row.tokens for row in out.stats.rows] == [count + 1, count + 1]
    assert (out.sequences[:, PROMPT + count] == END).all()
    # Without a processor of the caller's, drafts stay parallel.
    plain = model.generate(
        IDS, mode=mode, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=[*range(22)], sequence_bias={(END,): 9.0},
        generator=generators(2), **more,
    )  # fmt: skip
    assert (plain[:, PROMPT:] == 22).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("option", ["no_repeat_ngram_size", "bad_words_ids", "sequence_bias"])
@ways
def test_options_hold_as_processors_do(
    option: str, mode: str, clean: str, prediction: str, more: dict[str, Any]
) -> None:
    values = {"no_repeat_ngram_size": 2, "bad_words_ids": [[19, 19]], "sequence_bias": {(19, 19): -99.0}}
    out = model_for(clean, prediction).generate(
        IDS, mode=mode, max_new_tokens=NEW, generator=generators(2), **more, **{option: values[option]}
    )
    for row in out[:, PROMPT:].tolist():
        pairs = list(itertools.pairwise(row))
        assert len(set(pairs)) == len(pairs) if option == "no_repeat_ngram_size" else (19, 19) not in pairs


@pytest.mark.one_in(2)
@ways
@pytest.mark.parametrize("sampled", [False, True])
def test_a_state_moves_once_a_token(
    mode: str, clean: str, prediction: str, more: dict[str, Any], sampled: bool
) -> None:
    """As in transformers' own loop over that row: in order, once for every token that stays, whatever was drafted."""
    model, options = model_for(clean, prediction), {"mode": mode, **more, **({"do_sample": True} if sampled else {})}
    alone = []
    for row in range(2):
        counts = Counts()
        out = model.generate(
            IDS[row : row + 1], logits_processor=[counts], max_new_tokens=NEW, generator=generators(2)[row], **options
        )
        assert counts.asked == list(range(PROMPT, PROMPT + NEW))
        alone.append(out[0].tolist())
    together = model.generate(
        IDS, logits_processor=[Counts()], max_new_tokens=NEW, generator=generators(2), **options
    )
    assert together.tolist() == alone
    pairs = zip(IDS, generators(2), strict=True)
    requests = [Request(row, generator=g, logits_processor=[Counts()]) for row, g in pairs]
    done, _ = decode_all(model, requests, max_new_tokens=NEW, **options)
    assert [[*row, *d.tokens] for row, d in zip(IDS.tolist(), done, strict=True)] == alone


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_a_state_is_that_of_their_loop(mode: str) -> None:
    model = model_for("causal", "in_place")
    for row in IDS:
        mine, want = Counts(), Counts()
        out = model.generate(row[None], logits_processor=[mine], max_new_tokens=NEW, mode=mode)
        theirs = model._transformers_generate(
            row[None], attention_mask=torch.ones(1, PROMPT), logits_processor=[want], max_new_tokens=NEW,
            suppress_tokens=[MASK],
        )  # fmt: skip
        assert torch.equal(out, theirs) and mine.asked == want.asked


def test_gaps_are_filled_from_left_to_right() -> None:
    for clean in ("causal", "block", "full"):
        model = model_for(clean, "in_place")
        ids = torch.tensor([[1, 2, 3, 4, 5, MASK, MASK, 7, MASK, MASK, MASK, 2]])
        out = model.infill(ids, logits_processor=[Follows()])
        for place in (5, 6, 8, 9, 10):
            judged = Follows()(out[:, :place], torch.zeros(1, VOCABULARY))
            assert judged[0, out[0, place]].isfinite()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["cap", "rescale", "confidence"])
@pytest.mark.parametrize("clean", ["causal", "block", "full"])
def test_what_is_taken_back_takes_along_what_was_chosen_by_it(kind: str, clean: str) -> None:
    model, taken = model_for(clean, "in_place"), 0
    for mode, seed in itertools.product(("block", "diffusion"), range(5)):
        steps: list[Any] = []
        out = model.generate(
            IDS, mode=mode, reveal="remdm", remask=kind, remask_strength=0.7, steps_per_block=8, do_sample=True,
            max_new_tokens=NEW, logits_processor=[Follows()], generator=generators(2, seed), watchers=[steps.extend],
        )  # fmt: skip
        for row in out:
            for end in range(PROMPT, PROMPT + NEW):
                assert Follows()(row[None, :end], torch.zeros(1, VOCABULARY))[0, row[end]].isfinite()
        shown = [sum(token is not None for token in step.window) for step in steps if step.row == 0]
        taken += sum(later < before for before, later in itertools.pairwise(shown))
    assert taken


def test_processors_that_cannot_be_had_are_named() -> None:
    model = model_for("causal", "in_place")
    with pytest.raises(ValueError, match="logits_processor: it made"):
        model.generate(IDS, logits_processor=[lambda _ids, scores: scores[:, :3]], max_new_tokens=3)

    class Fixed(LogitsProcessor):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("it holds a socket")

        __call__ = staticmethod(no_last)  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"logits_processor: for a second row .* a socket"):
        model.generate(IDS, logits_processor=[Fixed()], max_new_tokens=3)
    assert model.generate(IDS[:1], logits_processor=[Fixed()], max_new_tokens=3).shape == (1, 8)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_called_blind_is(name: str) -> None:
    """The same scores from texts of one length, whatever they say."""
    processor = KINDS[name]()
    if looks_back(processor):
        return
    assert type(processor) in BLIND or isinstance(processor, SequenceBiasLogitsProcessor)
    scores = torch.randn(1, VOCABULARY, generator=generators(1)[0])
    for length in range(1, PROMPT + NEW + 1):
        one, other = (KINDS[name]()(torch.tensor(texts(seed, [length])), scores.clone()) for seed in (1, 2))
        assert torch.equal(one, other)
