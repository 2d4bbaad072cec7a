"""The variance that ranges of times are compared by is that of the loss, worked out over all masks and times."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracles import MASK, never_mask, raw_logits, texts, tiny

import hybrid.training.laboratory.clip
from hybrid import HybridForCausalLM
from hybrid.commands import main
from hybrid.noise import Noise, Noised, corrupt
from hybrid.training.batch import Batch
from hybrid.training.laboratory.clip import Clipped, Range, candidates, search
from hybrid.training.objective import Objective

pytestmark = pytest.mark.usefixtures("undrawn")
SIZE, LENGTH = 3, 6
RANGES: list[Range] = [(0.1, 0.6), (0.3, 0.8), (0.5, 1.0)]
NOISE = Noise(offset="grid", block_sizes=(SIZE,), seed_clean=False, canvas_prob=0.3, draft_prob=0.3, eps=0.01)


def exact(model: HybridForCausalLM, ids: list[int], t_range: Range, noise: Noise, seeds: bool) -> tuple[float, float]:
    """Mean and variance of a block's loss, over the blocks of a text, every mask and every time of the range."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    times = t_range[0] + (t_range[1] - t_range[0]) * (nodes + 1) / 2
    chances = noise.eps + (1 - noise.eps) * times
    first = second = 0.0
    size = LENGTH if model.config.clean_attention == "full" else SIZE
    for start in range(0, LENGTH, size):
        open_ = range(start + seeds, start + size)
        for pattern in itertools.product([False, True], repeat=len(open_)):
            hidden = [place for place, on in zip(open_, pattern, strict=True) if on]
            noisy = [MASK if i in hidden else ids[i] for i in range(start, start + size)]
            labels = [(i, i, 0, 0) for i in range(start)] + [(i, start, 1, 0) for i in range(start, start + size)]
            logits = never_mask(model, raw_logits(model, ids[:start] + noisy, labels)).double().log_softmax(-1)
            loss = sum(-float(logits[i, ids[i]]) for i in hidden) / len(open_)
            likely = chances ** len(hidden) * (1 - chances) ** (len(open_) - len(hidden))
            first += float((weights / 2 * likely * loss / chances).sum()) * size / LENGTH
            second += float((weights / 2 * likely * (loss / chances) ** 2).sum()) * size / LENGTH
    return first, second - first**2


def repeated(ids: list[int], count: int) -> Batch:
    rows = torch.tensor([ids] * count)
    return Batch(
        input_ids=rows, target=torch.ones_like(rows, dtype=torch.bool), doc=torch.zeros_like(rows),
        index=torch.arange(count),
    )  # fmt: skip


def measured(
    seeds: bool = False, antithetic: bool = True, clean: str = "causal", ranges: list[Range] = RANGES
) -> tuple[list[Clipped], list[tuple[float, float]]]:
    """What the search says, in the order of the ranges, and what is so."""
    model, ids = tiny(3, clean_attention=clean).requires_grad_(False), texts(5, [LENGTH])[0]
    noise = replace(NOISE, seed_clean=seeds, antithetic=antithetic)
    found = search(model, [repeated(ids, 2000)], noise, ranges, seed=2)
    assert [c.variance for c in found] == sorted(c.variance for c in found)
    return (
        sorted(found, key=lambda c: RANGES.index(c.t_range)),
        [exact(model, ids, t_range, noise, seeds) for t_range in ranges],
    )


@pytest.mark.parametrize(
    ("seeds", "antithetic", "clean"),
    [(False, True, "causal"), (True, True, "causal"), (False, False, "causal"), (False, True, "full")],
)
def test_the_variance_is_that_over_all_masks_and_times(seeds: bool, antithetic: bool, clean: str) -> None:
    found, so = measured(seeds, antithetic, clean)
    for clipped, (mean, variance) in zip(found, so, strict=True):
        assert clipped.mean == pytest.approx(mean, abs=4 * (variance / 2000) ** 0.5)
        assert abs(clipped.variance - variance) < 4 * clipped.standard_error
        assert clipped.standard_error < 0.08 * variance
    assert min(range(3), key=lambda i: found[i].variance) == min(range(3), key=lambda i: so[i][1])


MUTANTS: dict[str, Callable[[Noised], Noised]] = {
    "no weights": lambda noised: replace(noised, weight=noised.masked.float()),
    "squared weights": lambda noised: replace(noised, weight=noised.weight**2),
    "a mean over masked slots": lambda noised: replace(
        noised,
        weight=noised.weight * SIZE
        / noised.masked.unflatten(1, (-1, SIZE)).sum(2).clamp(min=1).repeat_interleave(SIZE, 1),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_reference_tells_another_variance(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid.training.laboratory.clip, "corrupt", lambda *given: MUTANTS[mutant](corrupt(*given)))
    (found,), ((_, variance),) = measured(ranges=RANGES[:1])
    assert abs(found.variance - variance) > 6 * found.standard_error


def test_ranges_are_those_of_bd3() -> None:
    found = candidates()
    assert len(found) == 11 + 9 + 7 + 5 + 3 + 1
    assert found[:3] == [(0.0, 0.5), (0.05, 0.55), (0.1, 0.6)]
    assert {(0.5, 1.0), (0.3, 0.8), (0.45, 0.95), (0.1, 1.0), (0.0, 1.0)} <= set(found)
    assert all(0 <= low < high <= 1 for low, high in found)
    assert candidates((1.0,), 0.5) == [(0.0, 1.0)]


@pytest.mark.parametrize(("widths", "stride"), [((0.0,), 0.1), ((1.5,), 0.1), ((0.5,), 0.0)])
def test_impossible_ranges_are_refused(widths: tuple[float, ...], stride: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        candidates(widths, stride)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="batches: 0"):
        search(tiny(0), [], NOISE, RANGES)
    with pytest.raises(ValueError, match="nothing of a block of one"):
        search(tiny(0), [repeated([1, 2, 3], 2)], Noise(block_sizes=(1,)), RANGES)


def test_it_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says to paste is a setting that the recipe takes."""
    monkeypatch.setenv("COLUMNS", "200")
    recipe = {
        "out": str(tmp_path / "model"),
        "model": {
            "config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "max_position_embeddings": 64, "block_size": 4},
            "objective": {"noise": {"offset": "prompt"}},
        },
        "data": {"class_path": "hybrid.training.data.SudokuData", "init_args": {"count": 20, "batch_size": 4}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "limit_val_batches": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for words, said in (([], "config: name the recipe"), (["--config", str(tmp_path / "recipe.yaml")], "no folder")):
        with pytest.raises(SystemExit):  # nothing is trained yet
            main(["train", "clip", *words])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "clip", "--help"])
    assert "usage: hybrid train clip" in capsys.readouterr().out
    main(["train", "fit", "--config", str(tmp_path / "recipe.yaml")])
    capsys.readouterr()
    main(["train", "clip", "--config", str(tmp_path / "recipe.yaml"), "--batches", "2", "--widths", "[0.5]",
          "--stride", "0.25"])  # fmt: skip
    said = capsys.readouterr().out
    assert sum(line.count("0.250 to 0.750") for line in said.splitlines()) == 1
    pasted = yaml.safe_load(said[said.index("model:") :])
    low, high = pasted["model"]["objective"]["noise"]["t_range"]
    assert (low, high) in [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 1.0)]
    Objective(noise=Noise(t_range=(low, high))).check(HybridForCausalLM.from_pretrained(tmp_path / "model").config, 34)
