"""Several blocks in flight: token for token and forward for forward a slow loop without a cache; and one block in
flight is what it always was."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from oracles import (
    MASK,
    clean_labels,
    continuations,
    generators,
    never_mask,
    next_token,
    padded,
    raw_logits,
    texts,
    tiny,
)

import hybrid.sampling.options.settings as settings
from hybrid import HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.sampling import Request, Session, Step, decode_all
from hybrid.sampling.reveal import rules
from hybrid.sampling.schemes.in_flight import InFlight

SIZE = 4
COUNT = 21
PROMPTS = texts(4, [7, 1, 4, 8])


def model_of(prediction: str, seed: int = 0, **fields: Any) -> HybridForCausalLM:
    return tiny(seed, clean_attention="block", diffusion_prediction=prediction, block_size=SIZE, peaked=0.3, **fields)


def slowly(
    model: HybridForCausalLM, prompt: Sequence[int], count: int, blocks: int, share: float, threshold: float,
    stop: int | None = None,
) -> tuple[list[int], int, int, int]:  # fmt: skip
    """One row, greedily, with forwards over the whole text: new tokens, drafts, forwards that commit, logits read.

    The blocks that are not committed are laid out as clean ones. Of these the leading ones without a mask are committed
    by the next forward. Behind them, `blocks` at most are drafted: the first, and each whose predecessor has a `share`
    of its slots shown and no stop.
    """
    following, known, limit = model.config.diffusion_prediction == "next", len(prompt), len(prompt) + count
    end = -(-limit // SIZE) * SIZE
    tokens = [*prompt, *[MASK] * (end - known)]
    committed, drafts, commits, read = known // SIZE * SIZE, 0, 0, 0
    if following and known == committed:
        tokens[known], read = next_token(model, prompt), 1
    while MASK in tokens[known:limit]:
        if stop in tokens[known:limit] and MASK not in tokens[known : tokens.index(stop, known)]:
            break
        begin = committed
        while MASK not in tokens[begin : begin + SIZE]:
            begin += SIZE
        # A new block takes part in the forward that makes room for it, unless its first token comes of that forward.
        last = min(end, (committed if following else begin) + blocks * SIZE)
        until = begin
        while until < last:
            until += SIZE
            shown = tokens[until - SIZE : until]
            if SIZE - shown.count(MASK) < share * SIZE or stop in tokens[max(known, until - SIZE) : until]:
                break
        logits = never_mask(model, raw_logits(model, tokens[:until], clean_labels(model, until)))
        drafts, commits = drafts + (begin == committed), commits + (begin > committed)
        before, first = list(tokens), True
        if following and begin > committed:
            tokens[begin], read = int(logits[begin - 1].argmax()), read + 1  # the seed
            if tokens[begin] == stop or begin + 1 == limit:
                break
            first = False  # what was seen without it is shown if it is sure
        for at in range(begin, until, SIZE):
            hidden = [i for i in range(at, at + SIZE) if before[i] == MASK and not (following and i == at)]
            laws = {i: logits[i - following].float().softmax(-1) for i in hidden}
            best = max(hidden, key=lambda i: float(laws[i].max()), default=None)
            for i in hidden:
                if float(laws[i].max()) >= threshold or (first and i == best):
                    tokens[i] = int(laws[i].argmax())
            first, read = first and not hidden, read + len(hidden)
        committed = begin
    new = tokens[known:limit]
    return (new[: new.index(stop) + 1] if stop in new else new), drafts, commits, read


@pytest.mark.one_in(3)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize(("blocks", "share"), [(2, 0.1), (3, 0.0), (3, 0.5), (4, 0.1)])
def test_it_decodes_as_the_slow_one_does(prediction: str, blocks: int, share: float) -> None:
    """Rows of different lengths in one batch, with and without an end of text."""
    fewer = ended = 0
    for seed, threshold in ((0, 0.3), (1, 0.5), (2, 0.9)):
        model, (ids, mask) = model_of(prediction, seed), padded(PROMPTS, "left")
        options: dict[str, Any] = {"mode": "block", "confidence_threshold": threshold, "max_new_tokens": COUNT}
        options["return_dict_in_generate"] = True
        whole = slowly(model, PROMPTS[0], COUNT, blocks, share, threshold)[0]
        for stop in (None, whole[5], whole[-4], PROMPTS[0][5]):  # the last stands in a prompt, and ends nothing there
            out: Any = model.generate(
                ids, mask, blocks_in_flight=blocks, block_add_threshold=share, eos_token_id=stop, **options
            )
            wanted = [slowly(model, prompt, COUNT, blocks, share, threshold, stop) for prompt in PROMPTS]
            assert continuations(out, ids.shape[1]) == [tokens for tokens, *_ in wanted]
            assert [(row.draft, row.settle) for row in out.stats.rows] == [(n, m) for _, n, m, _ in wanted]
            assert out.stats.logits == sum(read for *_, read in wanted)
            one: Any = model.generate(ids, mask, eos_token_id=stop, **options)
            fewer += out.stats.forwards < one.stats.forwards
            ended += any(row.tokens < COUNT for row in out.stats.rows)
    assert fewer > 3 and ended > 3


@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_one_block_in_flight_is_what_it_was(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, ledger, cache and the order of draws; and so are two of which the second waits for the first to end."""

    ids, mask = padded(PROMPTS, "holes")

    def run(model: HybridForCausalLM, **options: Any) -> tuple[Any, ...]:
        out: Any = model.generate(
            ids, mask, mode="block", max_new_tokens=COUNT, generator=generators(4), return_dict_in_generate=True,
            **options,
        )  # fmt: skip
        cache = out.past_key_values
        rows = [(row.tokens, row.draft, row.settle) for row in out.stats.rows]
        kept = [cache.ids[i, :n].tolist() for i, n in enumerate(cache.lengths)]
        return out.sequences.tolist(), rows, out.stats.forwards, out.stats.logits, kept

    ends: list[dict[str, Any]] = [{}, {"eos_token_id": [3, 14]}, {"do_sample": True, "temperature": 1.2}]
    for seed, end in product(range(3), ends):
        model = model_of(prediction, seed)
        for rule in ({"confidence_threshold": 0.4}, {"confidence_factor": 1.5}):
            want = run(model, **end, **rule)
            assert run(model, **end, **rule, blocks_in_flight=1) == want
            if prediction == "in_place":
                assert run(model, **end, **rule, blocks_in_flight=2, block_add_threshold=1.0) == want
            with monkeypatch.context() as patch:
                patch.setattr(settings, "_scheme", lambda *_: InFlight)
                assert run(model, **end, **rule) == want


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_of_a_batch_is_the_row_alone(prediction: str, sampled: bool) -> None:
    model, (ids, mask) = model_of(prediction, 1), padded(PROMPTS, "holes")
    options: dict[str, Any] = {
        "mode": "block", "blocks_in_flight": 3, "confidence_threshold": 0.4, "max_new_tokens": COUNT,
        "eos_token_id": [2], "return_dict_in_generate": True,
    }  # fmt: skip
    options |= {"do_sample": True, "temperature": 1.1} if sampled else {}
    batch: Any = model.generate(ids, mask, generator=generators(4), **options)
    for i, prompt in enumerate(PROMPTS):
        alone: Any = model.generate(torch.tensor([prompt]), generator=generators(4)[i], **options)
        assert continuations(alone, len(prompt)) == [continuations(batch, ids.shape[1])[i]]
        assert alone.stats.rows == [batch.stats.rows[i]]


def test_requests_with_it_and_without_it_in_one_session() -> None:
    model = model_of("in_place", 2)
    plans: list[dict[str, Any]] = [{}, {"blocks_in_flight": 2}, {"blocks_in_flight": 3, "block_add_threshold": 0.0},
                                   {"mode": "diffusion"}, {"blocks_in_flight": 3, "reveal": "factor"}]  # fmt: skip
    requests = [Request(PROMPTS[i % 4], **plan) for i, plan in enumerate(plans)]
    together, _ = decode_all(model, requests, mode="block", max_new_tokens=COUNT, slots=3)
    for request, done in zip(requests, together, strict=True):
        [alone], _ = decode_all(model, [request], mode="block", max_new_tokens=COUNT)
        assert (done.tokens, done.stats) == (alone.tokens, alone.stats)


@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_the_cache_goes_on_and_every_token_settles_once(prediction: str) -> None:
    model, (ids, mask) = model_of(prediction, 0), padded(PROMPTS[:3], "right")
    steps: list[Step] = []
    options: dict[str, Any] = {"mode": "block", "blocks_in_flight": 3, "confidence_threshold": 0.4}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    first: Any = model.generate(ids, mask, max_new_tokens=14, watchers=[steps.extend], **options)
    new = continuations(first, ids.shape[1])
    for row, tokens in enumerate(new):
        mine = [step for step in steps if step.row == row]
        assert [token for step in mine for token in step.settled] == tokens
        assert any(len(step.window) > SIZE for step in mine)
        assert [int(scores[row].argmax()) for scores in first.scores] == tokens
    text, real = padded([prompt + more for prompt, more in zip(PROMPTS, new, strict=False)], "left")
    more: dict[str, Any] = {"max_new_tokens": 9, "mode": "block", "confidence_threshold": 0.5}
    on = model.generate(text, real, past_key_values=first.past_key_values, **more)
    assert torch.equal(on, model.generate(text, real, **more))


def test_a_rule_that_can_wait_shows_what_it_is_sure_of() -> None:
    """Where it must, at least one slot; elsewhere nothing else, and maybe nothing. A caller's rule says that it can."""
    able = {name for name, factory in rules().items() if getattr(factory(), "can_wait", False)}
    assert able == {"threshold", "factor"}
    model, ids = model_of("in_place"), torch.tensor(PROMPTS[:1])
    asked: list[tuple[bool, int]] = []

    def reveal(canvas: Any, logits: torch.Tensor) -> Any:
        tokens, hidden = rules()["threshold"](confidence_threshold=0.9)(canvas, logits)
        fresh = (canvas.hidden & ~hidden).sum(1).tolist()
        asked.extend(zip(canvas.must.tolist(), fresh, strict=True))
        sure = (canvas.hidden & (canvas.certainty >= 0.9)).sum(1)
        assert torch.equal((canvas.hidden & ~hidden).sum(1), torch.where(canvas.must, sure.clamp(min=1), sure))
        return tokens, hidden

    options: dict[str, Any] = {"mode": "block", "blocks_in_flight": 3, "max_new_tokens": COUNT, "reveal": reveal}
    with pytest.raises(ValueError, match="can_wait"):
        model.generate(ids, **options)
    reveal.can_wait = True  # type: ignore[attr-defined]
    model.generate(ids, **options)
    assert {must for must, _ in asked} == {True, False} and (False, 0) in asked and (True, 0) not in asked


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {"blocks_in_flight": 0}, "blocks_in_flight is 0"),
        ({"clean_attention": "causal"}, {"blocks_in_flight": 2}, "'causal' in mode='block'"),
        ({}, {"blocks_in_flight": 2, "mode": "diffusion"}, "mode='diffusion'"),
        ({}, {"blocks_in_flight": 2, "reveal": "steps"}, "'steps'.*can_wait"),
        ({}, {"blocks_in_flight": 2, "sub_block_size": 2}, "sub_block_size"),
        ({}, {"block_add_threshold": 0.5}, "blocks_in_flight too"),
        ({}, {"blocks_in_flight": 2, "block_add_threshold": 1.5}, "block_add_threshold is 1.5"),
    ],
)
def test_where_it_makes_no_sense(fields: dict[str, Any], options: dict[str, Any], words: str) -> None:
    model = tiny(**{"clean_attention": "block", **fields})
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([[1, 2]]), **{"mode": "block", **options})


def test_a_draft_adapter_has_no_part_in_it() -> None:
    """Blocks in flight are clean, where it is not active."""
    model = model_of("in_place")
    adapter = DraftAdapter(model, rank=2, alpha=4.0, targets=("q_proj",))
    with pytest.raises(ValueError, match="draft_adapter"):
        model.generate(torch.tensor([[1, 2]]), mode="block", blocks_in_flight=2, draft_adapter=adapter)
    with pytest.raises(ValueError, match="draft_adapter"):
        Session(model, mode="block", draft_adapter=adapter).admit(Request([1, 2], blocks_in_flight=2))
