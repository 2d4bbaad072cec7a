"""What a job shows of itself: throughput, loss by noise, samples while it trains. None of it changes the training."""

import csv
import json
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from tiny_job import CONFIG, Noting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hybrid.training.watching.noise_picture
import hybrid.training.watching.throughput
from hybrid import HybridForCausalLM
from hybrid.noise import Noise
from hybrid.training.batch import Batch
from hybrid.training.callbacks import SaveModel
from hybrid.training.component import Losses
from hybrid.training.data import SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.objective import Objective, losses
from hybrid.training.running.start import new_model
from hybrid.training.text.tokenizing import character_tokenizer
from hybrid.training.watching.csv_log import CSVLog
from hybrid.training.watching.flops import logit_flops, peak_flops, slot_flops
from hybrid.training.watching.loss_by_noise import LossByNoise, binned
from hybrid.training.watching.samples import SampleModes
from hybrid.training.watching.throughput import Throughput, aside

BINS = 10


class Recording(HybridTask):
    """Keeps the figures of every batch, and does something when that many steps are done."""

    def __init__(self, at: int = -1, act: Callable[["Recording"], None] = lambda task: None, **given: Any) -> None:
        super().__init__(**{"config": CONFIG, **given})
        self.at, self.act = at, act
        self.kept: list[Losses] = []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.last_losses is not None
        self.kept.append(self.last_losses)
        if self.global_step == self.at:
            self.act(self)


def stop(task: Recording) -> None:
    task.trainer.should_stop = True


def job(
    folder: Path, steps: int, *callbacks: L.Callback, task: HybridTask | None = None, resume: bool = False,
    every: int = 5, accumulate: int = 1,
) -> HybridTask:  # fmt: skip
    """A job of so many steps on puzzles, logged in `folder`/logs/model every `every` steps."""
    task = task or Recording()
    saver = SaveModel(str(folder / "model"))
    L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=CSVLog(folder, "model", resume),
        callbacks=[*callbacks, saver], log_every_n_steps=every, accumulate_grad_batches=accumulate,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0,
    ).fit(task, SudokuData(count=60, batch_size=4), ckpt_path=saver.state_file if resume else None)  # fmt: skip
    return task


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "model" / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes as long as a job."""
    monkeypatch.setattr(hybrid.training.watching.noise_picture, "noise_picture", lambda curves, path: None)


# --- FLOPs --------------------------------------------------------------------------------------------------


def test_flops_are_those_that_pytorch_counts() -> None:
    """All products of matrices, those of attention included, which are written out for it here."""
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 8}
    model = new_model({**CONFIG, **fields, "num_hidden_layers": 2}, character_tokenizer("abcdefgh"), 0)
    batch, length = 3, 12
    ids = torch.randint(3, 11, (batch, length), generator=torch.Generator().manual_seed(0))
    given = Batch(input_ids=ids, target=ids >= 0, doc=ids * 0, index=torch.arange(batch))
    for objective, streams in ((Objective(diffusion_weight=0), 1), (Objective(noise=Noise(offset="grid")), 2)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            found = losses(model, given, objective, 0)
            found.total.backward()
        assert found.slots == streams * batch * length
        # Noisy slots are multiplied with the keys of both streams, where at most one row's tokens can be seen.
        slots = found.slots * slot_flops(model.config, length * (streams + 1) // 2)
        assert slots + found.logits * logit_flops(model.config) == counter.get_total_flops()


def test_the_peak_of_a_device_is_known_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> tuple[float | None, str]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_flops(torch.device("cuda"), torch.bfloat16)

    assert named("NVIDIA H100 80GB HBM3")[0] == 989.4e12
    assert named("NVIDIA H100 PCIe")[0] == 756e12
    assert named("NVIDIA A100-SXM4-80GB")[0] == 312e12
    assert named("NVIDIA L40S")[0] == 362e12 != named("NVIDIA L4")[0]
    assert named("NVIDIA GeForce RTX 4090")[0] == 165.2e12
    peak, why = named("Some Card 9000")
    assert peak is None and "Some Card 9000" in why
    assert peak_flops(torch.device("mps"), torch.float32)[0] is None
    peak, why = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None and peak > 1e8 and "products" in why


def test_mfu_and_tokens_a_second_are_of_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid.training.watching.throughput, "peak_flops", lambda device, dtype: (1e12, ""))
    task = job(tmp_path, 10, Throughput())
    rows = log_of(tmp_path)
    assert isinstance(task, Recording) and task.model is not None
    assert [int(row["step"]) for row in rows] == [4, 9], "in the rows of the losses"
    for row, kept in zip(rows, (task.kept[:5], task.kept[5:]), strict=True):
        assert float(row["train/loss"]) > 0
        config = task.model.config
        flops = sum(x.slots * slot_flops(config, 34) + x.logits * logit_flops(config) for x in kept)
        # Both have the same seconds below, which are whatever they were.
        assert float(row["mfu"]) / float(row["tokens_per_second"]) == pytest.approx(flops / 1e12 / (5 * 4 * 34))


def test_an_unknown_peak_is_told_and_leaves_mfu_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = hybrid.training.watching.throughput
    monkeypatch.setattr(told, "peak_flops", lambda device, dtype: (None, "nobody knows it"))
    with pytest.warns(UserWarning, match="nobody knows it"):
        job(tmp_path, 5, Throughput())
    (row,) = log_of(tmp_path)
    assert "mfu" not in row and float(row["tokens_per_second"]) > 0


def test_what_is_no_training_does_not_count_as_time_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(hybrid.training.watching.throughput.time, "perf_counter", lambda: now[0])
    clock = Throughput()
    trainer = L.Trainer(callbacks=[clock], logger=False, enable_checkpointing=False, accelerator="cpu")
    with aside(trainer):
        now[0] = 7.0
    assert clock._aside == 7.0
    with aside(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")):
        now[0] = 9.0
    assert clock._aside == 7.0


def test_bits_per_byte_are_the_losses_over_the_bytes(tmp_path: Path) -> None:
    task = job(tmp_path, 5)
    (row,) = log_of(tmp_path)
    assert isinstance(task, Recording)
    # A puzzle's solution is 16 characters of one byte, each a token; the loss is over these.
    assert float(row["train/ar_bits_per_byte"]) == pytest.approx(float(row["train/ar"]) / math.log(2), rel=1e-5)
    bound = float(row["train/diffusion"]) / math.log(2)
    assert float(row["train/diffusion_bits_per_byte"]) == pytest.approx(bound, rel=1e-5)
    task = job(tmp_path / "pooled", 5, task=Recording(objective=Objective(denominator="pooled")))
    assert "train/diffusion_bits_per_byte" not in log_of(tmp_path / "pooled")[0], "it is no bound"


# --- Loss by noise ------------------------------------------------------------------------------------------


def by_hand(kept: list[Losses]) -> dict[str, float]:
    """The figures of these batches, slot by slot."""
    slots: dict[int, list[tuple[float, bool]]] = {}
    for found in kept:
        assert found.masked_t is not None and found.masked_nll is not None and found.masked_right is not None
        for t, nll, right in zip(
            found.masked_t.tolist(), found.masked_nll.tolist(), found.masked_right.tolist(), strict=True
        ):
            slots.setdefault(min(int(t * BINS), BINS - 1), []).append((nll, right))
    figures = {}
    for place, values in slots.items():
        middle = f"{(place + 0.5) / BINS:.3g}"
        figures[f"loss_at_t/{middle}"] = sum(nll for nll, _ in values) / len(values)
        figures[f"accuracy_at_t/{middle}"] = sum(right for _, right in values) / len(values)
    return figures


def by_noise(row: dict[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if "_at_t/" in name and value}


def test_each_slot_counts_in_the_range_of_its_time() -> None:
    source = torch.Generator().manual_seed(3)
    t = torch.cat([torch.rand(300, generator=source), torch.tensor([0.0, 0.1, 0.95, 1.0])])
    nll, right = torch.rand(304, generator=source), torch.rand(304, generator=source) < 0.3
    sums = binned(Losses(masked_nll=nll, masked_t=t, masked_right=right), 10)
    for place in range(10):
        inside = [i for i in range(304) if min(int(t[i] * 10), 9) == place]
        assert sums[0, place] == len(inside)
        assert float(sums[1, place]) == pytest.approx(sum(float(nll[i]) for i in inside), rel=1e-5)
        assert sums[2, place] == sum(bool(right[i]) for i in inside)
    assert not binned(Losses(), 10).any(), "left to right only: there is no noise"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_log_has_what_each_noise_level_lost(accumulate: int, tmp_path: Path) -> None:
    # Times up to 0.55 only: the ranges above stay empty, and must not be filled with anything.
    task = Recording(objective=Objective(noise=Noise(t_range=(0.0, 0.55), offset="prompt")))
    job(tmp_path, 9, LossByNoise(), task=task, accumulate=accumulate)
    (row,) = log_of(tmp_path)
    expected = by_hand(task.kept[: 5 * accumulate])
    assert by_noise(row) == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 12 and "loss_at_t/0.65" not in row
    assert (tmp_path / "logs" / "model" / "loss_by_noise.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_job_logs_what_an_uninterrupted_one_does(accumulate: int, tmp_path: Path) -> None:
    """It stops between two logs, and, where gradients are accumulated, within a step."""

    def interrupt(task: HybridTask, batch: int) -> None:
        if task.kept and len(task.kept) == batch:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    class Ending(Recording):
        def on_train_batch_start(self, *args: Any) -> None:
            interrupt(self, 7 * accumulate + accumulate - 1)

    job(tmp_path / "whole", 10, LossByNoise(), accumulate=accumulate)
    with pytest.raises(SystemExit):
        job(tmp_path / "cut", 10, LossByNoise(), task=Ending(), accumulate=accumulate)
    assert [int(row["step"]) for row in log_of(tmp_path / "cut")] == [4]
    job(tmp_path / "cut", 10, LossByNoise(), accumulate=accumulate, resume=True)
    whole, cut = log_of(tmp_path / "whole"), log_of(tmp_path / "cut")
    assert [by_noise(row) for row in cut] == [by_noise(row) for row in whole]
    assert [row["step"] for row in cut] == ["4", "9"]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "logs" / "model" / "loss_by_noise.png").mkdir(parents=True)  # a folder in its place
    with pytest.warns(RuntimeWarning, match="could not be drawn"):
        job(tmp_path, 5, LossByNoise())
    HybridForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.usefixtures("no_picture")
def test_many_curves_are_thinned_and_the_newest_stays(tmp_path: Path) -> None:
    watcher = LossByNoise(minutes=0)
    job(tmp_path, 24, watcher, every=1)
    steps = [step for step, _ in watcher._curves]
    assert len(steps) <= 8 and steps[0] == 1 and steps[-1] == 24


# --- Samples ------------------------------------------------------------------------------------------------


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "model" / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recording]:
    folder = tmp_path_factory.mktemp("sampled")
    task = Recording()
    job(folder, 7, SampleModes(every=3, count=3), task=task)
    return folder, task


def test_samples_are_what_the_model_writes(sampled: tuple[Path, Recording]) -> None:
    """Those of the end, against `generate` of the model that was saved."""
    folder, task = sampled
    rows = samples_of(folder)
    modes = ("ar", "block", "diffusion", "speculative")
    assert [(row["step"], row["mode"]) for row in rows] == [(s, m) for s in (3, 6, 7) for m in modes for _ in range(3)]
    model = HybridForCausalLM.from_pretrained(folder / "model").eval()
    data = task.trainer.datamodule
    logged = {name: float(value) for name, value in log_of(folder)[-1].items() if name.startswith("samples/") and value}
    assert log_of(folder)[-1]["step"] == "6", "the number of the seventh step"
    for mode in modes:
        own = [row for row in rows if row["step"] == 7 and row["mode"] == mode]
        ids = torch.tensor([[1, *data.tokenizer.encode(row["prompt"])] for row in own])
        sure = {} if mode in ("ar", "speculative") else {"confidence_threshold": 0.9}
        out = model.generate(ids, mode=mode, max_new_tokens=16, return_dict_in_generate=True, **sure)
        texts = [data.tokenizer.decode(row, skip_special_tokens=True) for row in out.sequences[:, ids.shape[1] :]]
        assert [row["output"] for row in own] == texts
        assert logged[f"samples/tokens_per_forward_{mode}"] == pytest.approx(out.stats.tokens_per_forward)
        if mode == "speculative":
            assert logged["samples/acceptance"] == pytest.approx(out.stats.acceptance)
        assert all(row["target"] and len(row["target"]) == 16 for row in own)
    assert logged["samples/tokens_per_forward_ar"] == 1
    puzzles = {row["prompt"] + row["target"] for row in rows}
    assert len(puzzles) == 3 and puzzles <= set(data.held_out), "held-out puzzles, and their solutions"


class Disturbing(L.Callback):
    """What sampling must not be: it draws from the global random states, as a sampler that takes no generator would."""

    def on_train_batch_end(self, *args: Any) -> None:
        torch.rand(1)


def test_sampling_changes_nothing_of_the_training(tmp_path: Path) -> None:
    """Losses depend on global random numbers here, as with dropout; they are compared bit for bit."""

    def notes(name: str, *callbacks: L.Callback) -> str:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        (tmp_path / name).mkdir()
        job(tmp_path / name, 6, *callbacks, task=Noting(tmp_path / name / "notes"))
        return (tmp_path / name / "notes").read_text()

    plain = notes("plain")
    assert len(plain.splitlines()) == 6
    assert notes("sampled", SampleModes(every=2, count=2), LossByNoise(), Throughput()) == plain
    assert notes("disturbed", Disturbing()) != plain, "else this test could not fail"


def test_parts_of_the_model_keep_the_mode_they_had(tmp_path: Path) -> None:
    seen = []

    class Looking(Recording):
        def on_train_batch_end(self, *args: Any) -> None:
            assert self.model is not None
            if self.global_step == 1:
                self.model.model.norm.eval()  # a frozen part, say
            seen.append([part.training for part in self.model.modules()])

    job(tmp_path, 4, SampleModes(every=2, count=1, max_new_tokens=2), task=Looking())
    assert seen[1] == seen[2] == seen[3] and seen[1].count(False) == 1


def test_a_compiled_model_is_sampled_as_it_is(tmp_path: Path) -> None:
    """Sampling has shapes of its own, for which nothing should be compiled."""
    in_training = []

    class Compiled(Recording):
        def configure_model(self) -> None:
            first = self.model is None
            super().configure_model()
            if first:
                for layer in self.model.model.layers:  # type: ignore[union-attr]
                    layer.compile(backend=self.noted)  # type: ignore[operator]

        def noted(self, graph: Any, example: Any) -> Any:
            in_training.append(self.model.training)  # type: ignore[union-attr]
            return graph

    job(tmp_path, 1, SampleModes(every=1, count=1, max_new_tokens=4), task=Compiled())
    assert len(samples_of(tmp_path)) == 4 and in_training and all(in_training)


def test_a_model_that_has_fewer_modes_is_sampled_in_those(tmp_path: Path) -> None:
    full = {"config": {**CONFIG, "clean_attention": "full"}, "objective": Objective(ar_weight=0, diffusion_weight=1)}
    job(tmp_path, 1, SampleModes(count=1), task=Recording(**full))
    assert [row["mode"] for row in samples_of(tmp_path)] == ["block", "diffusion"]
    assert not any("acceptance" in name or name.endswith("_ar") for name in log_of(tmp_path)[0])


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    job(tmp_path, 1, SampleModes(prompts=["1234", "4.=1"], max_new_tokens=5))
    rows = samples_of(tmp_path)
    assert [row["prompt"] for row in rows] == ["1234", "4.=1"] * 4
    assert all(row["edit_similarity"] is None and row["target"] == "" for row in rows)


def test_samples_of_a_resumed_job_go_on(tmp_path: Path) -> None:
    sampler = SampleModes(every=2, count=1, max_new_tokens=3)
    job(tmp_path, 4, sampler)
    with (tmp_path / "logs" / "model" / "samples.jsonl").open("a") as file:
        file.write('{"step": 5, "mode": "ar"}\n{"step": 2, "mo')  # later than the checkpoint; cut by a kill
    job(tmp_path, 6, SampleModes(every=2, count=1, max_new_tokens=3), resume=True)
    assert [row["step"] for row in samples_of(tmp_path)] == [2] * 4 + [4] * 4 + [6] * 4
    job(tmp_path, 2, SampleModes(every=2, count=1, max_new_tokens=3))
    assert [row["step"] for row in samples_of(tmp_path)] == [2] * 4, "a new job begins anew"


def test_samples_that_fail_do_not_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("hybrid.evals.passes.outputs.decode_all", full)
    with pytest.warns(RuntimeWarning, match="no samples at step 2 .*no room.*the job goes on"):
        job(tmp_path, 2, SampleModes(count=1))
    assert (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": 0}, "every is 0"), ({"count": 0}, "count"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": []}, "prompts is empty"), ({"prompts": ["1", ""]}, "a prompt is empty"),
        ({"confidence_threshold": 1.5}, "confidence_threshold"), ({"block_size": 0}, "block_size"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SampleModes(**given)


def test_what_does_not_go_with_the_model_is_told_before_the_first_step(tmp_path: Path) -> None:
    task = Recording()
    with pytest.raises(ValueError, match="room for 1 to 59"):
        job(tmp_path, 1, SampleModes(prompts=["1" * 70], max_new_tokens=5), task=task)
    grid = Noise(offset="grid", canvas_prob=0)
    blocks = {"config": {**CONFIG, "clean_attention": "block"}, "objective": Objective(ar_weight=0, noise=grid)}
    with pytest.raises(ValueError, match="decodes in blocks of 4"):
        job(tmp_path, 1, SampleModes(block_size=8), task=Recording(**blocks))
    assert not task.kept
    with pytest.raises(ValueError, match="bins is 0"):
        LossByNoise(bins=0)
    with pytest.raises(ValueError, match="minutes is -1"):
        LossByNoise(minutes=-1)


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.__class__ = ModelParallelStrategy
    with warnings.catch_warnings(), pytest.raises(ValueError, match="take the callback out"):
        SampleModes().setup(trainer, None, "fit")
