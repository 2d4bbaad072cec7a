"""What is learned is kept in float32, and computed in what the machine is good at."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import tiny
from uneven import loader

import hybrid.training
from hybrid.training import HybridTask, LoRA, Noise, Objective, Optimizer, SaveModel, best_precision
from hybrid.training.cli import JobTrainer


def trainer(**given: Any) -> JobTrainer:
    return JobTrainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
           "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **given}
    )  # fmt: skip


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    tiny(0, dtype=torch.bfloat16, max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "low rank"])
def test_weights_of_a_narrow_checkpoint_are_trained_in_float32(lora: Any, precision: str, narrow: Path) -> None:
    """Small steps reach all that has a gradient; in bfloat16 most of them would be rounded away."""
    objective = Objective(noise=Noise(block_sizes=(4,)))
    task = HybridTask(
        init_from=str(narrow), lora=lora, objective=objective,
        optimizer=Optimizer(lr=2e-5, warmup_steps=0, decay="none", weight_decay=0.0),
    )  # fmt: skip
    before: dict[str, torch.Tensor] = {}

    class Before(SaveModel):
        def on_train_start(self, run: Any, module: Any) -> None:
            before.update({name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad})

    trainer(max_epochs=20, precision=precision, callbacks=[Before(str(narrow.parent / "out"))]).fit(task, loader(2))
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    moved = total = 0
    for name, p in task.named_parameters():
        if p.requires_grad and "embed" not in name:
            moved, total = moved + int((p != before[name]).sum()), total + p.numel()
    assert total and moved > 0.95 * total


def test_what_somebody_asks_for_in_words_is_done(narrow: Path) -> None:
    task = HybridTask(init_from=str(narrow), objective=Objective(noise=Noise(block_sizes=(4,))))
    trainer(precision="bf16-true").fit(task, loader(2))
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("amx", [True, False])
def test_auto_is_what_the_machine_is_good_at(
    amx: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = "bf16-mixed" if amx else "32-true"
    assert trainer(precision="auto").precision == expected == best_precision()
    assert f"precision: {expected}" in capsys.readouterr().err
    assert trainer(precision="64-true").precision == "64-true"
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="Precision 'narrow' is invalid"):
        trainer(precision="narrow")


def test_recipes_choose_by_the_machine() -> None:
    files = Path(hybrid.training.__path__[0], "recipes").glob("*.yaml")
    recipes = {file.name: yaml.safe_load(file.read_text()) for file in files}
    assert len(recipes) > 10
    for name, recipe in recipes.items():
        assert recipe["trainer"]["precision"] == ("32-true" if name == "drafter.yaml" else "auto"), name
