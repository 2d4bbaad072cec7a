"""Variants of a recipe are trained alike, measured on the same rows, and kept when the rest is interrupted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.commands import main
from hybrid.evals.laboratory.ablation import COLUMNS, figures, markdown, whole_rows
from hybrid.evals.likelihood import ar_nll
from hybrid.evals.measures import edit_similarity
from hybrid.training.cli import HybridCLI
from hybrid.training.laboratory.ablation import VARIANTS, variants
from hybrid.training.module import HybridTask
from hybrid.training.text.tokenizing import character_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn")
RECIPE: dict[str, Any] = {
    "model": {
        "config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "max_position_embeddings": 64, "block_size": 4},
        "objective": {"diffusion_weight": 0.3, "noise": {"offset": "random"}},
    },
    "data": {"class_path": "hybrid.training.data.SudokuData", "init_args": {"count": 20, "batch_size": 4}},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "limit_val_batches": 0},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_variants_that_say_what_the_recipe_says_are_left_out(recipe: Path) -> None:
    names = ["the recipe", "diffusion_weight 0.3", "blocks anywhere", "blocks on a grid", "draft_prob 0.4"]
    found, read = variants(recipe, {name: VARIANTS[name] for name in names}, steps=5, seed=3)
    assert [variant.name for variant in found] == ["the recipe", "blocks on a grid", "draft_prob 0.4"]
    assert len(read.datamodule.train_rows) == 20
    assert len({variant.key for variant in found}) == 3
    again, _ = variants(recipe, {"the recipe": {}}, steps=5, seed=3)
    other, _ = variants(recipe, {"the recipe": {}}, steps=6, seed=3)
    recipe.write_text(recipe.read_text() + "\n# edited\n")
    edited, _ = variants(recipe, {"the recipe": {}}, steps=5, seed=3)
    assert found[0].key == again[0].key != other[0].key != edited[0].key != again[0].key


def test_a_variant_that_cannot_be_is_named_before_anything_is_trained(recipe: Path) -> None:
    bad = {"the recipe": {}, "too long": {"model.objective.noise.block_sizes": [99]}}
    with pytest.raises(ValueError, match=r"too long: block_sizes is .*99"):
        variants(recipe, bad, steps=None, seed=0)


@pytest.mark.slow
def test_every_variant_of_the_list_is_one_of_a_recipe(recipe: Path) -> None:
    """A misspelt option would be an error of the command line; each must also go with the usual settings."""
    found, _ = variants(recipe, VARIANTS, steps=None, seed=0)
    same = {"diffusion_weight 0.3", "no first drafts", "canvas_prob 0.2", "blocks anywhere", "slots predict themselves"}
    assert [variant.name for variant in found] == [name for name in VARIANTS if name not in same]


def test_rows_are_whole_and_evenly_spread() -> None:
    ids = torch.tensor(texts(0, [8] * 6))
    doc = torch.zeros_like(ids)
    doc[1, 4:], doc[3, 6:] = 1, -1
    target = torch.arange(8).expand(6, -1) >= torch.tensor([0, 0, 3, 0, 2, 0])[:, None]
    found, goal = whole_rows(ids, target, doc, 10)
    assert torch.equal(found, ids[[0, 2, 4, 5]])
    assert goal.int().argmax(1).tolist() == [1, 3, 2, 1]
    assert goal[:, -1].all()
    assert torch.equal(whole_rows(ids, target, doc, 2)[0], ids[[0, 5]])
    with pytest.raises(ValueError, match="no held-out row is of one document"):
        whole_rows(ids[1:2], target[1:2], doc[1:2], 2)
    with pytest.raises(ValueError, match="rows is 0"):
        whole_rows(ids, target, doc, 0)


def decoded(model: HybridForCausalLM, tokenizer: Any, ids: Tensor) -> list[tuple[str, str]]:
    """What each row's second half is decoded to in blocks, one row at a time, and what it is."""
    found = []
    for row in ids:
        out = model.generate(
            row[None, :6], mode="block", block_size=4, confidence_threshold=0.9, max_new_tokens=6, eos_token_id=[]
        )
        found.append((tokenizer.decode(out[0, 6:], skip_special_tokens=True), tokenizer.decode(row[6:])))
    return found


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
def test_figures_are_those_of_the_model(clean: str) -> None:
    tokenizer = character_tokenizer("abcdefghijklmnopqrst")  # and three specials: 23
    model = tiny(1, clean_attention=clean, peaked=2.0)
    ids = 3 + torch.tensor(texts(4, [12] * 5, vocabulary=20))
    ids, target = whole_rows(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), 5)
    found = figures(model, tokenizer, ids, target, window=4, samples=2)
    ar = ["ar_bits_per_byte", "acceptance", "ar_quality"]
    block = ["block_bits_per_byte", "block_quality", "block_tokens_per_forward"]
    if clean == "causal":
        nats = float(ar_nll(model, ids, target).sum())
        assert found["ar_bits_per_byte"] == pytest.approx(nats / math.log(2) / (5 * 11))
        assert found["ar_tokens_per_forward"] == 1.0
        out = model.generate(
            ids[:, :6], mode="speculative", block_size=4, max_new_tokens=6, eos_token_id=[],
            return_dict_in_generate=True,
        )  # fmt: skip
        assert found["acceptance"] == pytest.approx(out.stats.acceptance)
    else:
        assert all(found.get(name) is None for name in (ar if clean == "full" else ar[:1]))
    if clean != "full":
        assert found["block_bits_per_byte"] is not None
    assert all(found[name] is not None for name in block[1:])
    assert found["masked_bits_per_byte"] is not None
    spread = torch.tensor([edit_similarity(*pair) for pair in decoded(model, tokenizer, ids)])
    assert found["block_quality"] == pytest.approx(float(spread.mean()), abs=1e-6)
    assert found["block_quality_error"] == pytest.approx(float(spread.std() / 5**0.5), abs=1e-6)
    lines = markdown({"one": found}).splitlines()
    assert len(lines) == 3
    assert all(line.count("|") == len(COLUMNS) + 2 for line in lines)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_was(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[list[str]] = []
    run = HybridCLI.run

    def counted(arguments: list[str]) -> HybridCLI:
        runs.append(arguments)
        return run(arguments)

    def interrupting(task: HybridTask, *args: Any) -> None:
        if len(runs) == 2 and task.global_step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(HybridCLI, "run", counted)
    monkeypatch.setattr(HybridTask, "on_train_batch_end", interrupting)
    names = "the recipe,blocks anywhere,left to right only,complementary masks"
    words = [
        "train", "ablate", "--config", str(recipe), "--out", str(tmp_path / "out"), "--steps", "2", "--rows", "3",
        "--samples", "2", "--window", "4", "--only", names,
    ]  # fmt: skip
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(words)
    results = tmp_path / "out" / "results.json"
    assert len(json.loads(results.read_text())) == 1
    main(words)
    assert len(runs) == 4, "two, of which one was interrupted, that one again, and the one that was left"
    assert ["--ckpt_path" in arguments for arguments in runs] == [False, False, True, False]
    capsys.readouterr()
    main(words)
    assert len(runs) == 4, "all is there"
    table = capsys.readouterr().out
    for name in ("the recipe", "left to right only", "complementary masks"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        figures = [float(cell.split("±")[0]) for cell in row.split("|")[2:-1] if cell.strip() != "–"]
        assert len(figures) == len(COLUMNS) - (name == "left to right only"), "of which the minutes are not known"
        assert all(math.isfinite(figure) for figure in figures)
    assert "blocks anywhere" not in table
    main([*words[:-4], "--window", "2", "--only", "the recipe"])
    assert len(runs) == 4, "measured anew, not trained anew"
    kept = list(json.loads(results.read_text()).values())
    assert len(kept) == 4
    # What was interrupted is what it would have been.
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    main([*words[:-1], "left to right only"])
    (whole,) = json.loads((tmp_path / "other" / "results.json").read_text()).values()
    assert {**whole, "minutes": None} == kept[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "config: name a recipe"),
        (["--config", "nowhere.yaml"], "config: there is no file nowhere.yaml"),
        (["--config", "{recipe}", "--only", "magic"], "only: there is no variant magic"),
        (["--config", "{recipe}", "--variants", "{recipe}"], "is not of the form"),
    ],
)
def test_what_cannot_be_compared_is_named(
    words: list[str], said: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    given = [word.format(recipe=tmp_path / "list.yaml" if before == "--variants" else recipe)
             for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["train", "ablate", *given])
    assert said in capsys.readouterr().err
