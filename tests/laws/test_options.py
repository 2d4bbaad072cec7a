"""Options of transformers' generate, in every mode: each changes something, and what it promises holds."""

from typing import Any

import pytest
import torch
from oracles import MASK, generators, padded, texts, tiny
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from hybrid import HybridForCausalLM
from hybrid.sampling import Step, decode
from hybrid.training.objective import Objective, losses
from hybrid.training.text.tokenizing import character_tokenizer

MODES = ("ar", "block", "diffusion", "speculative")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def trained() -> HybridForCausalLM:
    """Goes round in steps of three over the tokens 3 to 14, with detours: sure of itself, but not everywhere."""
    model = tiny(0, dtype=torch.float32, hidden_size=32, intermediate_size=64, initializer_range=0.1)
    source = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        start = torch.randint(0, MASK, (16, 1), generator=source)
        ids = 3 + (start + 3 * torch.arange(16)) % 12
        ids = torch.where(torch.rand(16, 16, generator=source) < 0.15, 3 + (ids - 2) % 12, ids)
        every = torch.ones_like(ids)
        batch = {"input_ids": ids, "target": every.bool(), "doc": 0 * every, "index": torch.arange(16) + 16 * step}
        optimizer.zero_grad()
        losses(model, batch, Objective(), seed=0).total.backward()  # type: ignore[arg-type]
        optimizer.step()
    return model.eval()


IDS = torch.tensor([[9, 12, 3, 6, 9]])


def new(model: HybridForCausalLM, mode: str, ids: Tensor = IDS, **options: Any) -> list[list[int]]:
    """New tokens; sampled with a generator a row."""
    if options.get("do_sample"):
        options["generator"] = generators(len(ids) * options.get("num_return_sequences", 1))
    length = {} if {"max_length", "generation_config"} & set(options) else {"max_new_tokens": 20}
    out = model.generate(ids, mode=mode, **{**length, **options})
    assert isinstance(out, Tensor)
    return out[:, ids.shape[1] :].tolist()


def never_nine(ids: Tensor, scores: Tensor) -> Tensor:
    scores = scores.clone()
    scores[:, 9] = -torch.inf
    return scores


SAMPLE = {"do_sample": True, "temperature": 1.5}
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"max_new_tokens": 7}),
    ({}, {"max_length": 9}),
    ({}, {"eos_token_id": 12}),
    ({}, {"eos_token_id": [9, 1]}),
    ({}, {"do_sample": True, "temperature": 3.0}),
    (SAMPLE, {**SAMPLE, "temperature": 0.3}),
    (SAMPLE, {**SAMPLE, "top_k": 1}),
    (SAMPLE, {**SAMPLE, "top_p": 0.1}),
    (SAMPLE, {**SAMPLE, "min_p": 0.9}),
    (SAMPLE, {**SAMPLE, "num_return_sequences": 2}),
    ({}, {"repetition_penalty": 5.0}),
    ({}, {"no_repeat_ngram_size": 2}),
    ({}, {"bad_words_ids": [[9]]}),
    ({}, {"suppress_tokens": [6]}),
    ({}, {"sequence_bias": {(9,): -50.0}}),
    ({"eos_token_id": 12}, {"eos_token_id": 12, "min_new_tokens": 9}),
    ({}, {"logits_processor": LogitsProcessorList([never_nine])}),
    ({}, {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids[:, -1] == 12])}),
    ({}, {"generation_config": GenerationConfig(max_new_tokens=5)}),
]


@pytest.mark.one_in(2)
@every_mode
@pytest.mark.parametrize(("without", "option"), OPTIONS, ids=lambda o: ",".join(o)[:40])
def test_an_option_changes_something(
    trained: HybridForCausalLM, mode: str, without: dict[str, Any], option: dict[str, Any]
) -> None:
    assert new(trained, mode, **without) != new(trained, mode, **option)


@pytest.mark.parametrize(
    "option",
    [o for _, o in OPTIONS if not o.get("do_sample") and "generation_config" not in o and "max_length" not in o],
    ids=lambda o: ",".join(o)[:40],
)
def test_speculation_and_transformers_loop_agree_with_ar(trained: HybridForCausalLM, option: dict[str, Any]) -> None:
    rows = torch.tensor(texts(3, [5] * 6))
    padding = {"pad_token_id": 0, "attention_mask": torch.ones_like(rows)}  # none: a 0 is a token here
    want = new(trained, "ar", rows, **padding, **option)
    for fused in (False, True):
        assert new(trained, "speculative", rows, **padding, fused=fused, **option) == want
    for row, expected in zip(rows, want, strict=True):  # theirs pads with other rows in sight
        theirs = trained._transformers_generate(
            row[None], attention_mask=torch.ones(1, 5), pad_token_id=0,
            **{"max_new_tokens": 20, **option, "suppress_tokens": [*option.get("suppress_tokens", []), MASK]},
        )[0, 5:].tolist()  # fmt: skip
        assert theirs + [0] * (len(expected) - len(theirs)) == expected


@every_mode
def test_what_processors_forbid_never_comes(trained: HybridForCausalLM, mode: str) -> None:
    assert any(9 in row for row in new(trained, mode, torch.tensor(texts(1, [4] * 8))))
    nines = {"suppress_tokens": [9]}, {"suppress_tokens": torch.tensor([9, 9])}, {"bad_words_ids": [[9]]}
    for option in (*nines, {"logits_processor": [never_nine]}):
        assert not any(9 in row for row in new(trained, mode, torch.tensor(texts(1, [4] * 8)), **option))


@every_mode
def test_a_criterion_is_asked_for_every_settled_token(trained: HybridForCausalLM, mode: str) -> None:
    """With the row's own text, once a length; nothing comes after it, in the cache neither."""
    rows = torch.tensor(texts(2, [3, 3]))
    whole = new(trained, mode, rows)
    seen: list[list[int]] = []

    def criterion(ids: Tensor, scores: Any) -> bool:
        seen.append(ids[0].tolist())
        return ids.shape[1] == 3 + 5

    out: Any = trained.generate(
        rows, mode=mode, max_new_tokens=20, stopping_criteria=[criterion], return_dict_in_generate=True
    )
    assert out.sequences[:, 3:].tolist() == [row[:5] for row in whole]
    texts_seen = [given + row[:n] for given, row in zip(rows.tolist(), whole, strict=True) for n in range(1, 6)]
    assert sorted(seen) == sorted(texts_seen)
    assert all(length <= 8 for length in out.past_key_values.lengths)
    on: Any = trained.generate(out.sequences, mode=mode, max_new_tokens=3, past_key_values=out.past_key_values)
    assert torch.equal(on, trained.generate(out.sequences, mode=mode, max_new_tokens=3))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer("abcdefghijkl")


@every_mode
def test_stop_strings_end_a_row_where_they_end(trained: HybridForCausalLM, mode: str, tokenizer: Any) -> None:
    text = tokenizer.decode(new(trained, mode)[0])
    stop = text[6:8]
    cut = text[: text.index(stop) + 2]
    out = new(trained, mode, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(out[0]) == cut and len(cut) < len(text)
    with pytest.raises(ValueError, match="tokenizer"):
        new(trained, mode, stop_strings=[stop])


@every_mode
def test_streamers_are_shown_what_is_settled(
    trained: HybridForCausalLM, mode: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    want = tokenizer.decode(new(trained, mode)[0])
    new(trained, mode, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == want
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True)
    new(trained, mode, streamer=iterator)
    assert "".join(iterator) == want
    with pytest.raises(ValueError, match="streamer"):
        new(trained, mode, IDS.repeat(2, 1), streamer=iterator)

    class Drafts(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer)
            self.drafts: list[list[int]] = []

        def put_draft(self, value: Tensor) -> None:
            self.drafts.append(value.tolist())

    streamer = Drafts()
    new(trained, mode, streamer=streamer)
    capsys.readouterr()
    assert bool(streamer.drafts) == (mode != "ar")
    if mode in ("block", "diffusion"):
        assert any(MASK in draft for draft in streamer.drafts)


class Heard:
    """A streamer that writes down all that it is told."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[Any] = []
        self.fails_at = fails_at

    def put(self, value: Tensor) -> None:
        if self.fails_at is not None and len(self.told) >= self.fails_at:
            raise RuntimeError("put")
        self.told.append(value.flatten().tolist())

    def put_draft(self, value: Tensor) -> None:
        self.told.append(("draft", value.tolist()))

    def end(self) -> None:
        self.told.append("end")

    @property
    def text(self) -> list[int]:
        return [token for value in self.told if isinstance(value, list) for token in value]


@pytest.mark.parametrize(
    ("mode", "more"),
    [*((mode, {}) for mode in (*MODES, "infill")), *(("speculative", x) for x in ({"fused": True}, {"block_size": 4}))],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_each_row_has_its_own_streamer(
    trained: HybridForCausalLM, mode: str, more: dict[str, Any], sampled: bool
) -> None:
    """Which is told what the row alone would tell it, and that it is over when the row is."""
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 1, 2], [3, 3]]
    if mode == "infill":
        rows = [[*row, MASK, 2, MASK, MASK, 1] for row in rows]
    ids, real = padded(rows, "left")
    options: dict[str, Any] = {**more, "do_sample": sampled, **({"temperature": 1.2} if sampled else {})}
    if mode != "infill":
        options |= {"mode": mode, "max_new_tokens": 11, "eos_token_id": [4, 9]}
    act = trained.infill if mode == "infill" else trained.generate
    streamers: list[Any] = [Heard(), Heard(), None, Heard()]
    out = act(ids, real, streamer=streamers, generator=generators(4), **options)
    for index, (row, streamer, text) in enumerate(zip(rows, streamers, out.tolist(), strict=True)):
        alone, own = Heard(), generators(4)[index]
        one = act(torch.tensor([row]), streamer=alone, generator=own, **options)[0].tolist()
        assert text[ids.shape[1] - len(row) :][: len(one)] == one
        if streamer is not None:
            assert streamer.told == alone.told and streamer.told.count("end") == 1 and streamer.told[-1] == "end"
            assert mode == "infill" or streamer.text == one
    assert len({tuple(s.text) for s in streamers if s is not None}) == 3


@every_mode
def test_streamers_of_a_batch_are_refused_or_released(trained: HybridForCausalLM, mode: str) -> None:
    ids, one = IDS.repeat(3, 1), Heard()
    for given, words in (
        (one, "pass a list with one for each"), ([one, Heard()], "has 3 rows"), ([one, one, Heard()], "twice"),
        ([one, 3, Heard()], "is a int"), ([], "3 rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"streamer.*{words}"):
            new(trained, mode, ids, streamer=given)
        assert one.told == [], "nobody is told of what is refused"
    streamers = [Heard(), Heard(fails_at=2), Heard()]
    with pytest.raises(RuntimeError, match="put"):
        new(trained, mode, ids, streamer=streamers)
    assert all(s.told.count("end") == 1 and s.told[-1] == "end" for s in streamers)
    with pytest.raises(ValueError, match="streamer"):
        trained.generate(ids, streamer=[Heard(), Heard(), Heard()], typical_p=0.5, do_sample=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="streamer: one shows one text"):
        list(decode(trained, [[1], [2]], mode=mode, streamer=Heard(), max_new_tokens=2))


@every_mode
@pytest.mark.parametrize("sampled", [False, True])
def test_scores_are_those_of_the_moment_of_reveal(trained: HybridForCausalLM, mode: str, sampled: bool) -> None:
    rows = torch.tensor(texts(2, [3, 3]))
    options: dict[str, Any] = {"generator": generators(2), **SAMPLE, "top_k": 3} if sampled else {}
    out: Any = trained.generate(
        rows, mode=mode, max_new_tokens=12, eos_token_id=12, output_scores=True, return_dict_in_generate=True, **options
    )
    counts = [stats.tokens for stats in out.stats.rows]
    assert len(out.scores) == out.log_probs.shape[1] == max(counts)
    for row, count in enumerate(counts):
        assert (out.log_probs[row, count:] == 0).all() and (out.log_probs[row, :count] < 0).all()
        for i in range(count):
            token, scores = out.sequences[row, 3 + i], out.scores[i][row]
            assert scores[token] == scores.max() or sampled
            assert scores[token].isfinite() and scores[MASK] == -torch.inf
            assert scores.isfinite().sum() == (3 if sampled else MASK)
            if not sampled:
                assert scores.log_softmax(0)[token].item() == pytest.approx(out.log_probs[row, i].item(), abs=1e-4)
    if mode in ("ar", "speculative"):  # the law of the text before, whoever proposed the token
        logits = trained(out.sequences).logits[:, 2:-1]
        logits[..., MASK] = -torch.inf
        exact = logits.log_softmax(-1).gather(-1, out.sequences[:, 3:, None])[..., 0]
        for row, count in enumerate(counts):
            assert (exact[row, :count] - out.log_probs[row, :count]).abs().max() < 1e-3


@every_mode
def test_watchers_see_every_token_settle_once(trained: HybridForCausalLM, mode: str) -> None:
    rows = torch.tensor(texts(2, [3, 3, 3]))
    steps: list[Step] = []
    out: Any = trained.generate(
        rows, mode=mode, max_new_tokens=12, eos_token_id=12, watchers=[steps.extend], return_dict_in_generate=True
    )
    for row, stats in enumerate(out.stats.rows):
        mine = [step for step in steps if step.row == row]
        settled = [token for step in mine for token in step.settled]
        assert settled == out.sequences[row, 3 : 3 + stats.tokens].tolist()
        position = 3
        for step in mine:
            assert step.position == position and len(step.confidence) == len(step.settled) + len(step.window)
            position += len(step.settled)
        assert sum(step.kind == "draft" for step in mine) == stats.draft
    assert max(step.forward for step in steps) == out.stats.forwards


def test_the_pipeline_works(trained: HybridForCausalLM, tokenizer: Any) -> None:
    generator = pipeline("text-generation", model=trained, tokenizer=tokenizer)
    text = generator("adg", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    want = trained.generate(torch.tensor([tokenizer.encode("adg")]), max_new_tokens=6)
    assert text == tokenizer.decode(want[0], skip_special_tokens=True)
    text = generator("adg", max_new_tokens=6, mode="block", do_sample=False)[0]["generated_text"]
    assert text.startswith("adg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stopping_criteria": 3}, "stopping_criteria"),
        ({"logits_processor": 3}, "logits_processor"),
        ({"output_scores": True}, "return_dict_in_generate"),
        ({"max_time": -1}, "max_time"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"stop_strings": "", "tokenizer": 1}, "stop_strings"),
        ({"watchers": [1]}, "watchers"),
        ({"fused": True}, "fused"),
        ({"mode": "block", "reveal": "remdm", "remask": "often"}, "remask"),
        ({"mode": "block", "reveal": "factor", "entropy_bound": 0.1}, "entropy_bound"),
        ({"mode": "block", "entropy_bound": -1.0}, "entropy_bound"),
        ({"mode": "block", "confidence_factor": 0}, "confidence_factor"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny().generate(IDS, **options)
