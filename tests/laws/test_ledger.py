"""Every batched forward is counted once, and a speed is what its definition says."""

from typing import Any

import pytest
import torch
from oracles import COMBINATIONS, continuations, late, padded, texts, tiny

from hybrid.sampling import GenerateOutput

LENGTHS = [7, 1, 4, 8]

every_mode = pytest.mark.parametrize(("mode", "clean", "prediction"), COMBINATIONS)
ending = pytest.mark.parametrize("ends", [False, True])


class Counted:
    """One `generate` on a peaked model, and how many rows each of its forwards really had."""

    def __init__(self, mode: str, clean: str, prediction: str, ends: bool = False, **options: Any) -> None:
        self.model = tiny(6, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction)
        self.ids, self.real = padded(texts(6, LENGTHS), "left")
        self.options = {"mode": mode, "max_new_tokens": 13, "return_dict_in_generate": True} | options
        if mode in ("block", "diffusion"):
            self.options["confidence_threshold"] = 0.5
        if ends:  # rows end at different times
            free = self.run()[0]
            self.options["eos_token_id"] = [late(free[0]), late(free[3])]
        self.new, self.output, self.rows = self.run()
        self.stats = self.output.stats

    def run(self) -> tuple[list[list[int]], GenerateOutput, list[int]]:
        rows: list[int] = []
        hooks = [
            self.model.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]))),
            self.model.model.embed_tokens.register_forward_hook(lambda *_: embedded.append(1)),
        ]
        embedded: list[int] = []
        output: Any = self.model.generate(self.ids, self.real, **self.options)
        for hook in hooks:
            hook.remove()
        assert len(embedded) == len(rows)  # nothing goes past the model into the backbone
        return continuations(output, self.ids.shape[1]), output, rows


@every_mode
@ending
def test_every_forward_is_counted_once(mode: str, clean: str, prediction: str, ends: bool) -> None:
    run = Counted(mode, clean, prediction, ends)
    stats = run.stats
    assert stats.prefill + stats.settle + stats.draft == stats.forwards == len(run.rows)
    assert stats.prefill == (clean != "full")
    # A row's forwards are those in which it was active; prefill belongs to nobody.
    assert sum(row.settle + row.draft for row in stats.rows) == sum(run.rows[stats.prefill :])
    for row in stats.rows:
        assert row.settle <= stats.settle
        assert row.settle + row.draft <= stats.settle + stats.draft
    assert max(row.settle + row.draft for row in stats.rows) == stats.settle + stats.draft
    assert (len(set(run.rows)) > 1) == (len({row.settle + row.draft for row in stats.rows}) > 1)
    if mode == "diffusion" or clean == "full":  # one window a row, or one canvas, with nothing to settle
        assert stats.settle == 0
    if mode == "ar":
        assert stats.draft == 0


@every_mode
@ending
def test_new_tokens_are_those_that_the_caller_gets(
    mode: str, clean: str, prediction: str, ends: bool
) -> None:
    run = Counted(mode, clean, prediction, ends)
    stats, stop = run.stats, run.options.get("eos_token_id", [])
    new = run.output.sequences[:, run.ids.shape[1] :].tolist()
    counts = [next((i + 1 for i, token in enumerate(row) if token in stop), 13) for row in new]
    assert [row.tokens for row in stats.rows] == counts
    assert stats.tokens == sum(counts)
    assert (set(counts) != {13}) == ends


@every_mode
@ending
def test_speed_is_what_the_definition_says(mode: str, clean: str, prediction: str, ends: bool) -> None:
    """New tokens but those that prefill gave, over the forwards of each row."""
    run = Counted(mode, clean, prediction, ends)
    stats = run.stats
    if clean == "causal" or mode in ("ar", "speculative"):  # prefill gives each row one token
        assert [row.free for row in stats.rows] == [1] * len(LENGTHS)
    elif clean == "full" or prediction == "in_place":
        assert [row.free for row in stats.rows] == [0] * len(LENGTHS)
    else:  # it gives one where the prompt ends with a block
        assert [row.free for row in stats.rows] == [int(n % 4 == 0) for n in LENGTHS]
    gained = sum(row.tokens - row.free for row in stats.rows)
    forwards, drafts = sum(row.settle + row.draft for row in stats.rows), sum(row.draft for row in stats.rows)
    assert stats.tokens_per_forward == gained / forwards
    assert stats.tokens_per_draft == (gained / drafts if drafts else None)
    assert (stats.acceptance is not None) == (mode == "speculative")
    assert 0 < stats.time_to_first_token <= stats.seconds
    assert stats.tokens_per_second == stats.tokens / stats.seconds
    assert "tokens per forward" in str(stats) and stats.mode == mode


@ending
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_ar_gains_exactly_one_token_a_forward(rows: int, ends: bool) -> None:
    model = tiny(7, peaked=0.4)
    ids, real = padded(texts(7, LENGTHS[:rows]), "right")
    stop = [1, 2, 3, 4] if ends else None
    output: Any = model.generate(
        ids, real, max_new_tokens=12, eos_token_id=stop, return_dict_in_generate=True
    )
    assert output.stats.tokens_per_forward == 1.0
    assert output.stats.settle == max(row.tokens for row in output.stats.rows) - 1


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
def test_one_token_costs_no_forward_after_prefill(mode: str) -> None:
    ids = torch.tensor([[1, 2]])
    output: Any = tiny().generate(ids, mode=mode, max_new_tokens=1, return_dict_in_generate=True)
    stats = output.stats
    assert (stats.prefill, stats.settle, stats.draft, stats.tokens) == (1, 0, 0, 1)
    assert stats.tokens_per_forward is None and stats.tokens_per_draft is None
    assert "no forward" in str(stats)


@ending
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_a_speculative_round_is_two_forwards_that_commit(prediction: str, ends: bool) -> None:
    """The first commits its seed and gives the next token and drafts; the second verifies those."""
    run = Counted("speculative", "causal", prediction, ends)
    for row in run.stats.rows:
        assert row.draft == 0
        assert all(2 <= n <= run.model.config.block_size + 1 for n in row.accepted)
        # The last round may have been cut off by the end of the text, in its middle too.
        rooted = row.settle - 2 * len(row.accepted)
        assert rooted in (0, 1)
        assert sum(row.accepted[: len(row.accepted) - (not rooted)]) < row.tokens - row.free or row.tokens == 1
        assert row.tokens - row.free <= sum(row.accepted) + rooted
    rounds = [n for row in run.stats.rows for n in row.accepted]
    assert len(set(rounds)) > 1
    assert run.stats.acceptance == sum(rounds) / len(rounds)


def test_block_forwards_by_hand() -> None:
    """One slot a draft: windows of [seed, 3 masks] take 3 drafts, and a settle pass but for the last."""
    options = {"steps_per_block": 3, "max_new_tokens": 12, "return_dict_in_generate": True}
    output: Any = tiny(8).generate(torch.tensor([[1, 2, 3]]), mode="block", **options)
    stats = output.stats
    assert (stats.prefill, stats.draft, stats.settle) == (1, 9, 2)
    assert stats.tokens_per_forward == 11 / 11
    assert stats.tokens_per_draft == 11 / 9


def test_a_cache_saves_prefill_tokens_and_changes_no_count() -> None:
    """A text that goes on is prefilled from where its cache ends, once."""
    model, widths = tiny(9), []
    ids = torch.tensor(texts(9, [30]))
    first: Any = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    with_hook = model.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    second: Any = model.generate(
        first.sequences, max_new_tokens=8, past_key_values=first.past_key_values, return_dict_in_generate=True
    )
    with_hook.remove()
    assert widths == [1] * 8
    assert (second.stats.prefill, second.stats.settle, second.stats.tokens_per_forward) == (1, 7, 1.0)
