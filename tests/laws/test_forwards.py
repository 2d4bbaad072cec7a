"""What forwards are saved: a settle pass drafts the next block, nothing is settled that nothing follows, and no logits
are computed that nobody reads."""

from typing import Any

import pytest
import torch
from oracles import COMBINATIONS, padded, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.sampling import Step
from hybrid.sampling.reveal import rules


def counted(model: HybridForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    return model.generate(ids, mask, return_dict_in_generate=True, **options)


def test_a_settle_pass_drafts_the_next_block() -> None:
    """Blocks of 4, four drafts each: separately 4 drafts and a settle pass a block; carried, the settle pass is the
    next block's first draft. Behind the last block nothing is settled."""
    model = tiny(1, clean_attention="block")
    ids = torch.tensor(texts(1, [8]))
    out = counted(model, ids, mode="block", steps_per_block=4, max_new_tokens=12)
    assert (out.stats.prefill, out.stats.draft, out.stats.settle) == (1, 4 + 3 + 3, 2)
    # The convention of Fast-dLLM v2 needs the settled block's last row for the next one's first token.
    model = tiny(1, clean_attention="block", diffusion_prediction="next")
    out = counted(model, ids, mode="block", steps_per_block=4, max_new_tokens=12)
    assert (out.stats.draft, out.stats.settle) == (9, 2)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_rows_carry_at_their_own_pace(steps: int) -> None:
    model = tiny(1, clean_attention="block")
    rows = texts(2, [8, 5, 1, 11])
    ids, mask = padded(rows, "left")
    together = counted(model, ids, mask, mode="block", steps_per_block=steps, max_new_tokens=13)
    alone = [counted(model, torch.tensor([r]), mode="block", steps_per_block=steps, max_new_tokens=13) for r in rows]
    for row, single in zip(together.stats.rows, alone, strict=True):
        assert (row.draft, row.settle) == (single.stats.rows[0].draft, single.stats.rows[0].settle)
    for text, real, single in zip(together.sequences, mask, alone, strict=True):
        whole = torch.cat([text[: len(real)][real.bool()], text[len(real) :]])
        assert torch.equal(whole, single.sequences[0])


def test_a_block_that_the_text_ends_in_is_not_settled() -> None:
    model, ids = tiny(1, peaked=0.4), torch.tensor(texts(1, [5]))
    for mode, settle in {"block": 2, "diffusion": 0}.items():
        out = counted(model, ids, mode=mode, steps_per_block=2, max_new_tokens=12)
        assert out.stats.settle == settle
    whole = counted(model, ids, mode="block", steps_per_block=2, max_new_tokens=12).sequences[0, 5:]
    eos = int(whole[1])
    assert counted(model, ids, mode="block", steps_per_block=2, max_new_tokens=12, eos_token_id=eos).stats.settle == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("mode", "clean", "prediction"),
    # Carried drafts are in nobody's sight.
    [c for c in COMBINATIONS if c[0] in ("block", "diffusion") and c != ("block", "block", "in_place")],
)
@pytest.mark.parametrize("rule", [{"confidence_threshold": 0.3}, {"reveal": "random"}])
def test_nothing_is_drafted_behind_the_end_of_a_text(
    mode: str, clean: str, prediction: str, rule: dict[str, Any]
) -> None:
    """An end-of-text token that is shown with nothing hidden before it ends the text at once. So does the limit, where
    the canvas does not end with it. A long text that is watched says when that is."""
    for seed in range(2):
        model = tiny(seed, peaked=0.2, clean_attention=clean, diffusion_prediction=prediction, block_size=6)
        [row] = texts(seed, [11])
        seen: dict[int, int] = {}  # by position, the first forward after which all before it and itself are shown

        def watch(steps: list[Step], seen: dict[int, int] = seen) -> None:
            ready = steps[0].position + len(steps[0].settled)
            if not steps[0].settled:
                ready += next((i for i, token in enumerate(steps[0].window) if token is None), len(steps[0].window))
            for position in range(11, ready):
                seen.setdefault(position - 11, steps[0].forward)

        def run(row: list[int] = row, model: HybridForCausalLM = model, **options: Any) -> Any:
            options = {"mode": mode, "max_new_tokens": 20, "generator": torch.Generator()} | rule | options
            return counted(model, torch.tensor([row]), **options)

        new = run(watchers=[watch]).sequences[0, 11:].tolist()
        for token in set(new):
            out, place = run(eos_token_id=token), new.index(token)
            assert out.sequences[0, 11:].tolist() == new[: place + 1]
            assert out.stats.forwards == seen[place]
        for count in range(1, 9 if mode == "block" and clean != "full" else 0):
            out = run(max_new_tokens=count)
            assert out.sequences[0, 11:].tolist() == new[:count]
            assert out.stats.forwards == seen[count - 1]


def test_a_rule_that_hides_again_has_its_steps() -> None:
    """What ends a text may not stand at the last step; a rule of the caller's that hides again has to say so."""
    model, ids = tiny(0, peaked=0.2), torch.tensor(texts(1, [5]))
    options: dict[str, Any] = {"mode": "diffusion", "reveal": "remdm", "steps_per_block": 6, "remask_strength": 0.9}

    def run(**more: Any) -> Any:
        return counted(model, ids, generator=torch.Generator().manual_seed(3), max_new_tokens=12, **options, **more)

    new = run().sequences[0, 5:].tolist()
    for token in new[1:]:
        out = run(eos_token_id=token)
        assert out.sequences[0, 5:].tolist() == new[: new.index(token) + 1] and out.stats.draft == 6
    rule = rules()["remdm"](steps_per_block=6, remask_strength=0.9)
    options = {"mode": "diffusion", "reveal": lambda canvas, logits: rule(canvas, logits)}
    with pytest.raises(ValueError, match="remasks = True"):
        run()
    options["reveal"].remasks = True
    run()


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_no_logits_that_nobody_reads(clean: str, prediction: str) -> None:
    """One row, one token a draft: each draft needs the logits of what is hidden, and a settle pass the last slot's."""
    model = tiny(1, clean_attention=clean, diffusion_prediction=prediction)
    ids = torch.tensor(texts(1, [8]))
    out = counted(model, ids, mode="diffusion", steps_per_block=5, max_new_tokens=5)
    seeds = clean == "causal" or (clean == "block" and prediction == "next")
    hidden = 4 if seeds else 5
    assert out.stats.logits == seeds + sum(range(1, hidden + 1))
    if clean == "causal":
        out = counted(model, ids, mode="ar", max_new_tokens=5)
        assert out.stats.logits == 5
        out = counted(model, ids, mode="block", block_size=3, steps_per_block=2, max_new_tokens=6)
        assert out.stats.logits == 1 + (2 + 1) + 1 + (2 + 1)  # the seed, a window, its settle pass, a window
        out = counted(model, ids, mode="speculative", block_size=3, max_new_tokens=12)
        roots = (out.stats.rows[0].settle + 1) // 2
        assert out.stats.logits == 1 + roots * (1 + 2) + (out.stats.rows[0].settle - roots) * 3


def test_a_ragged_batch_takes_hardly_more_forwards_than_its_slowest_row() -> None:
    """Sixteen rows of unequal prompts: rows do not wait for one another."""
    for clean, mode in [("causal", "block"), ("block", "block"), ("causal", "diffusion"), ("causal", "speculative")]:
        model = tiny(3, peaked=0.5, clean_attention=clean, block_size=8)
        rows = texts(5, [1 + 2 * i % 13 for i in range(16)])
        ids, mask = padded(rows, "left")
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 40}
        options |= {"block_size": 8} if mode == "speculative" else {"confidence_threshold": 0.5}
        together = counted(model, ids, mask, **options).stats
        slowest = max(counted(model, torch.tensor([row]), **options).stats.forwards for row in rows)
        assert together.forwards <= 1.15 * slowest
