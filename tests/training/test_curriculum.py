"""What is learned changes in the course of a job as it should, by the step, so that resuming changes nothing."""

from itertools import groupby
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from oracles import texts, tiny
from torch import Tensor

import hybrid.training.objective
from hybrid.noise import Noise
from hybrid.training.batch import Batch
from hybrid.training.callbacks import SaveModel
from hybrid.training.component import Losses
from hybrid.training.data import SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.objective import Objective, losses
from hybrid.training.objectives.curriculum import Curriculum
from hybrid.training.optimizer import Optimizer

STEPS = 12
CURRICULUM = Curriculum(warmup=(1, 2, 4), stable=16, decay=(8, 4), warmup_share=0.3, decay_share=0.4)
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "block_size": 4,
}  # fmt: skip


def phases(curriculum: Curriculum, steps: int) -> list[tuple[int, int]]:
    """(size, steps) of each stretch of one size."""
    sizes = [curriculum.size(step / steps) for step in range(steps)]
    return [(size, len(list(group))) for size, group in groupby(sizes)]


def test_blocks_grow_stay_and_shrink_with_each_size_equally_long() -> None:
    assert phases(CURRICULUM, 200) == [(1, 20), (2, 20), (4, 20), (16, 60), (8, 40), (4, 40)]
    assert CURRICULUM.size(1.0) == 4, "the size that is decoded with"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"warmup": ()}, [(16, 160), (8, 40)]),
        ({"decay": ()}, [(1, 10), (2, 10), (4, 20), (16, 160)]),
        ({"warmup": (), "decay": ()}, [(16, 200)]),
        ({"warmup_share": 0.5, "decay_share": 0.5}, [(1, 25), (2, 25), (4, 50), (8, 100)]),
    ],
)
def test_a_phase_without_sizes_takes_no_time(fields: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    given: dict[str, Any] = {
        "warmup": (1, 2, 4, 4), "stable": 16, "decay": (8,), "warmup_share": 0.2, "decay_share": 0.2
    }
    assert phases(Curriculum(**{**given, **fields}), 200) == expected


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.7])
def test_every_progress_has_a_size(share: float) -> None:
    curriculum = Curriculum(warmup=(1, 2, 4), stable=8, decay=(7, 6, 5), warmup_share=share, decay_share=1 - share)
    edges = [i / 30 + shift for i in range(31) for shift in (-1e-16, 0.0, 1e-16)]
    assert {curriculum.size(min(1.0, max(0.0, x))) for x in edges} <= {1, 2, 4, 5, 6, 7, 8}


def test_stages_follow_one_another() -> None:
    objective = Objective(ar_first=0.5, curriculum=CURRICULUM)
    before, first, last = (objective.at(x) for x in (0.499, 0.5, 1.0))
    assert (before.ar_weight, before.diffusion_weight) == (1.0, 0.0)
    assert (first.diffusion_weight, first.noise.block_sizes) == (0.3, (1,)), "the curriculum is of what is left"
    assert objective.at(0.7).noise.block_sizes == (16,)
    assert (last.diffusion_weight, last.noise.block_sizes) == (0.3, (4,))
    plain = Objective()
    assert plain.at(0.2) is plain


def test_clean_text_of_a_block_causal_model_has_the_size_of_the_stage() -> None:
    """Blocks of one of a block-causal model are left to right, whatever its own block size: what follows a token does
    not change what is said of it."""
    model = tiny(0, clean_attention="block", block_size=8)
    ids = torch.tensor(texts(1, [16]))
    batch = Batch(
        input_ids=ids, target=torch.arange(16)[None] == 4, doc=ids * 0, index=torch.tensor([0])
    )  # fmt: skip
    noise = Noise(offset="grid", canvas_prob=0.0, draft_prob=1.0)
    objective = Objective(ar_weight=0.0, noise=noise, curriculum=Curriculum(warmup=(1, 2), stable=4, decay=(8,)))
    objective.check(model.config, 16)
    later, earlier = ids.clone(), ids.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 20
    earlier[:, 3] = (earlier[:, 3] + 1) % 20

    def loss(progress: float, tokens: Tensor) -> Tensor:
        return losses(model, Batch(**{**batch, "input_ids": tokens}), objective.at(progress), 0).total

    assert torch.equal(loss(0.0, ids), loss(0.0, later))
    assert not torch.equal(loss(0.0, ids), loss(0.0, earlier))
    assert not torch.equal(loss(0.5, ids), loss(0.5, later)), "a block of four shows what stands behind"


def test_a_stage_of_blocks_of_one_has_nothing_masked_and_no_accuracy() -> None:
    """With seeds, blocks of one are left to right: the part is 0, not NaN, and the job goes on."""
    model, ids = tiny(0), torch.tensor(texts(1, [16]))
    batch = Batch(input_ids=ids, target=ids >= 0, doc=ids * 0, index=torch.tensor([0]))
    found = losses(model, batch, Objective(noise=Noise(block_sizes=(1,), canvas_prob=0.0), z_loss=1e-4), 0)
    assert found.masked_accuracy is None
    assert float(found.diffusion if found.diffusion is not None else 1) == 0
    assert found.total.isfinite()
    found.total.backward()


# --- In a job -----------------------------------------------------------------------------------------------


class Noting(HybridTask):
    """Keeps every loss, bit for bit, and stops when so many steps are done."""

    def __init__(self, until: int, objective: Objective) -> None:
        super().__init__(TINY, objective=objective, optimizer=Optimizer(warmup_steps=2))
        self.until = until
        self.found: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.found.append(loss.item().hex())
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.trainer.should_stop = self.global_step >= self.until


def job(folder: Path, objective: Objective, until: int = STEPS, resume: bool = False) -> Noting:
    task, saver = Noting(until, objective), SaveModel(str(folder))
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1, val_check_interval=4,
        check_val_every_n_epoch=None, callbacks=[saver],
    )  # fmt: skip
    data = SudokuData(count=50, batch_size=4)
    trainer.fit(task, data, ckpt_path=saver.state_file if resume else None, weights_only=True)
    return task


OBJECTIVES = {
    "curriculum": Objective(curriculum=CURRICULUM),
    "two stages": Objective(ar_first=0.5),
    "both": Objective(ar_first=0.3, curriculum=CURRICULUM, noise=Noise(complementary=True), z_loss=1e-4),
}


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        pytest.param("curriculum", 9, marks=pytest.mark.slow),
        pytest.param("two stages", 4, marks=pytest.mark.slow),
        ("both", 6),
    ],
)
def test_a_resumed_job_goes_on_in_the_stage_it_was_in(name: str, stop: int, tmp_path: Path) -> None:
    objective = OBJECTIVES[name]
    whole = job(tmp_path / "whole", objective)
    assert len(whole.found) == STEPS
    first = job(tmp_path / "model", objective, until=stop)
    assert first.global_step == stop
    second = job(tmp_path / "model", objective, resume=True)
    assert first.found + second.found == whole.found


def test_a_job_learns_each_step_what_its_progress_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, float, tuple[int, ...]]] = []

    def spy(model: Any, batch: Batch, objective: Objective, seed: int) -> Losses:
        seen.append((model.training, objective.diffusion_weight, objective.noise.block_sizes))
        return losses(model, batch, objective, seed)

    monkeypatch.setattr(hybrid.training.objective, "losses", spy)
    job(tmp_path / "model", Objective(ar_first=0.5, curriculum=Curriculum(warmup=(1, 2), stable=8, decay=(4,))))
    sizes = {0.0: 1, 0.1: 2, 0.2: 8, 0.8: 4}
    expected = []
    for step in range(STEPS):
        share = (step / STEPS - 0.5) / 0.5
        size = [found for begin, found in sizes.items() if begin <= share + 1e-9]
        expected.append((0.3, (size[-1],)) if share >= 0 else (0.0, ()))
    assert [found[1:] for found in seen if found[0]] == expected
    # Held-out figures are of the last stage all along.
    assert [found[1:] for found in seen if not found[0]] == [(0.3, (4,))] * 3
