"""Jobs leave models that load, whatever ends them; what goes wrong is said before it reaches the weights."""

import csv
import importlib.resources
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from oracles import tiny
from tiny_job import with_loss
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.optimization import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

import hybrid.training.data
import hybrid.training.objective
from hybrid import HybridForCausalLM
from hybrid.noise import Noise
from hybrid.training.batch import Batch
from hybrid.training.callbacks import SaveModel
from hybrid.training.cli import HybridCLI
from hybrid.training.component import Losses
from hybrid.training.data import SudokuData
from hybrid.training.job import fit
from hybrid.training.module import HybridTask
from hybrid.training.objective import Objective
from hybrid.training.optimizer import Optimizer
from hybrid.training.running.start import new_model
from hybrid.training.step import NonFiniteError
from hybrid.training.tasks.stdlib import Corpus, Document
from hybrid.training.text.tokenizing import character_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn")
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "block_size": 4,
}  # fmt: skip


def puzzles(count: int = 20) -> SudokuData:
    return SudokuData(count=count, batch_size=4)


class Watched(HybridTask):
    """Notes which samples it sees, and does something when that many steps are done."""

    def __init__(self, at: int = -1, act: Callable[["Watched"], None] = lambda task: None, **given: Any) -> None:
        super().__init__(**{"config": TINY, **given})
        self.at, self.act = at, act
        self.seen: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.seen += batch["index"].tolist()
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == self.at:
            self.act(self)


def interrupt(task: Watched) -> None:
    raise KeyboardInterrupt


def stop(task: Watched) -> None:
    task.trainer.should_stop = True


def trainer(folder: Path, steps: int, *callbacks: L.Callback, minutes: float = 10.0) -> L.Trainer:
    """A job of so many steps, without logs."""
    return L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[SaveModel(str(folder), minutes), *callbacks],
    )  # fmt: skip


def weights(model: HybridForCausalLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder: Path) -> dict[str, bytes]:
    """All that SaveModel wrote: the folder and the state beside it."""
    paths = [*folder.rglob("*"), folder.parent / f"{folder.name}.ckpt"]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder.parent / "logs" / folder.name / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


# --- What a job leaves --------------------------------------------------------------------------------------


def test_a_job_leaves_a_model_that_loads_and_a_log(tmp_path: Path) -> None:
    data, task, folder = puzzles(), Watched(12, stop), tmp_path / "runs" / "model"
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    found = fit(task, data, folder, minutes=1)
    assert found.global_step == 12
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c, "as it was"
    model, tokenizer = HybridForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert same(weights(model), weights(task.model))
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), HybridForCausalLM)
    assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
    config = model.config
    assert (config.vocab_size, config.mask_token_id) == (len(tokenizer), tokenizer.mask_token_id)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.generate(torch.tensor([[1, 3, 4]]), mode="block", max_new_tokens=5).shape[0] == 1
    # Nothing half-written is left beside it.
    assert {path.name for path in folder.parent.iterdir()} == {"model", "model.ckpt", "logs"}

    rows = log_of(folder)
    assert [int(row["step"]) for row in rows] == [4, 9, 11]  # every five, and the last
    assert [float(row["tokens"]) for row in rows] == [steps * 4 * 34 for steps in (5, 10, 12)]
    for row in rows:
        ar, diffusion, total = (float(row[f"train/{name}"]) for name in ("ar", "diffusion", "loss"))
        assert total == pytest.approx(ar + 0.3 * diffusion, rel=1e-5)
        assert 0 <= float(row["train/masked_accuracy"]) <= 1
        assert float(row["gradient_norm"]) > 0
        assert 0 < float(row["lr"]) < 1e-3


def test_the_clock_ends_a_job_and_its_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: now[0]))

    class ASecondAStep(Watched):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            now[0] += 1.0

    task = ASecondAStep(optimizer=Optimizer(lr=1.0e-3, warmup_steps=1))
    fit(task, puzzles(), tmp_path / "model", minutes=8 / 60)
    assert task.rates == pytest.approx([1.0e-3, *(1.0e-3 * (1 - n / 7) for n in range(7))])
    HybridForCausalLM.from_pretrained(tmp_path / "model")


def test_a_new_save_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for steps in (1, 2):
        task = Watched(steps, stop)
        fit(task, puzzles(), tmp_path / "model", minutes=1)
        assert same(weights(HybridForCausalLM.from_pretrained(tmp_path / "model")), weights(task.model))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.ckpt", "logs"}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_all(tmp_path: Path, seed: int) -> None:
    found = []
    for turn in range(2):
        torch.manual_seed(turn)  # whatever the global state is
        task = Watched(seed=seed)
        trainer(tmp_path / "model", 3).fit(task, puzzles())
        found.append(weights(task.model))
    assert same(*found)
    assert not same(found[0], weights(new_model(TINY, character_tokenizer("1234.="), 1 - seed)))


# --- What ends a job early ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """A job that was interrupted after 6 steps and went on to 16, and what was left each time."""

    first: Watched
    second: Watched
    between: dict[str, Tensor]
    end: dict[str, Tensor]
    log: list[dict[str, str]]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    folder = tmp_path_factory.mktemp("resumed") / "model"
    first, second = Watched(6, interrupt), Watched(16, stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, puzzles(), folder, minutes=1)
    between = weights(HybridForCausalLM.from_pretrained(folder))
    AutoTokenizer.from_pretrained(folder)
    assert fit(second, puzzles(), folder, minutes=1, resume=True).global_step == 16
    return Resumed(first, second, between, weights(HybridForCausalLM.from_pretrained(folder)), log_of(folder))


def test_an_interrupt_leaves_a_model_and_resuming_goes_on(resumed: Resumed) -> None:
    assert same(resumed.between, weights(resumed.first.model))
    # No sample is lost and none comes twice, through the ends of passes (20 puzzles) too.
    assert resumed.first.seen + resumed.second.seen == list(range(16 * 4))
    assert same(resumed.end, weights(resumed.second.model))


def test_the_log_of_a_resumed_job_goes_on(resumed: Resumed) -> None:
    steps = [int(row["step"]) for row in resumed.log]
    assert steps == sorted(set(steps))
    assert {4, 9, 14} <= set(steps), "what was logged before the interrupt is still there"


def test_the_tokens_of_a_resumed_job_are_all_counted(resumed: Resumed) -> None:
    assert resumed.second.tokens_seen == 16 * 4 * 34
    assert {int(row["step"]): float(row["tokens"]) for row in resumed.log}[14] == 15 * 4 * 34


def test_resuming_a_job_that_is_done_keeps_its_log(tmp_path: Path) -> None:
    for _ in range(2):
        words = small("sudoku.yaml", tmp_path / "model")
        state = tmp_path / "model.ckpt"
        HybridCLI.run([*words, "--ckpt_path", str(state)] if state.exists() else words)
    assert [row["step"] for row in log_of(tmp_path / "model") if row["train/loss"]] == ["0", "1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_asked_to_end_saves_first(number: int, tmp_path: Path) -> None:
    folder, asked = tmp_path / "model", lambda task: os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as ended:
        fit(Watched(3, asked), puzzles(), folder, minutes=1)
    assert ended.value.code == {signal.SIGTERM: None, signal.SIGINT: 1}[number]
    task = Watched(5, stop)
    fit(task, puzzles(), folder, minutes=1, resume=True)
    assert task.seen == list(range(3 * 4, 5 * 4))


def test_a_second_ctrl_c_ends_a_job_within_a_step_and_saves_nothing_half_done(tmp_path: Path) -> None:
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    fit(Watched(2, stop), puzzles(), tmp_path / "model", minutes=1)
    before = files(tmp_path / "model")

    class Impatient(Watched):
        def configure_gradient_clipping(self, *args: Any, **given: Any) -> None:
            super().configure_gradient_clipping(*args, **given)
            if self.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        fit(Impatient(), puzzles(), tmp_path / "model", minutes=1)
    assert files(tmp_path / "model") == before
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c, "as it was"


def test_a_step_that_was_half_accumulated_begins_anew(tmp_path: Path) -> None:
    """Interrupted in the second of three batches: what follows is as if nothing had happened."""
    def run(folder: Path, task: Watched, state: Path | None = None) -> Watched:
        job = trainer(folder, 5)
        job.accumulate_grad_batches = 3
        job.fit(task, puzzles(40), ckpt_path=state)
        return task

    class Halfway(Watched):
        def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
            if batch_idx == 7:
                raise KeyboardInterrupt

    whole = run(tmp_path / "whole", Watched())
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", Halfway())
    parts = run(tmp_path / "parts", Watched(), tmp_path / "parts.ckpt")
    assert parts.seen == whole.seen[2 * 3 * 4 :]
    assert parts.rates == whole.rates[2 * 3 :]
    assert same(weights(parts.model), weights(whole.model))
    assert parts.tokens_seen == whole.tokens_seen == 5 * 3 * 4 * 34


def test_a_finished_job_can_go_on_too(tmp_path: Path) -> None:
    """The clock ended it; with more time it sees new samples, not the first ones with their first noise again."""
    first, second = Watched(4, stop), Watched(8, stop)
    fit(first, puzzles(), tmp_path / "model", minutes=1)
    assert fit(second, puzzles(), tmp_path / "model", minutes=2, resume=True).global_step == 8
    assert first.seen + second.seen == list(range(8 * 4))


def test_without_resume_a_job_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        task = Watched(2, stop)
        assert fit(task, puzzles(), tmp_path / "model", minutes=1).global_step == 2
        assert task.seen == list(range(8))
    # And resuming where there is nothing to resume is a first start.
    task = Watched(2, stop)
    assert fit(task, puzzles(), tmp_path / "other", minutes=1, resume=True).global_step == 2


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(muon_lr: float | None, tmp_path: Path) -> None:
    chosen = {"optimizer": Optimizer(warmup_steps=3, muon_lr=muon_lr)}
    whole = Watched(**chosen)
    trainer(tmp_path / "whole", 9).fit(whole, puzzles())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path / "parts", 9).fit(Watched(4, interrupt, **chosen), puzzles())
    parts = Watched(**chosen)
    trainer(tmp_path / "parts", 9).fit(parts, puzzles(), ckpt_path=tmp_path / "parts.ckpt", weights_only=True)
    assert len(parts.seen) == 5 * 4
    assert parts.rates == whole.rates[4:]
    assert same(weights(parts.model), weights(whole.model))


class BeforeEachStep(L.Callback):
    """What the weights and the files are when a step begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.weights, self.files = weights(pl_module.model), files(self.folder)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("value", "muon_lr"), [(math.nan, None), (math.inf, None), (math.nan, 0.02)])
def test_what_is_not_finite_stops_the_job_before_the_weights(
    what: str, value: float, muon_lr: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, calls = tmp_path / "model", hybrid.training.objective.losses, [0]

    def poisoned(model: HybridForCausalLM, *given: Any) -> Losses:
        found = real(model, *given)
        calls[0] += 1
        if calls[0] == 4:
            if what == "loss":
                return with_loss(found, value)
            found.parts["ar"].total.register_hook(lambda gradient: gradient * value)
        return found

    monkeypatch.setattr(hybrid.training.objective, "losses", poisoned)
    before, task = BeforeEachStep(folder), Watched(optimizer=Optimizer(muon_lr=muon_lr))
    with pytest.raises(NonFiniteError, match=rf"the {what}.* (nan|inf) at step 3.*checkpoint is intact.*lr"):
        trainer(folder, 9, before, minutes=0).fit(task, puzzles())  # saved after every step
    assert same(weights(task.model), before.weights)
    assert len(before.files) > 4
    assert files(folder) == before.files
    assert same(weights(HybridForCausalLM.from_pretrained(folder)), before.weights)


def test_any_other_failure_leaves_the_last_save_alone(tmp_path: Path) -> None:
    def fail(task: Watched) -> None:
        raise RuntimeError("the machine is on fire")

    fit(Watched(2, stop), puzzles(), tmp_path / "model", minutes=1)
    before = files(tmp_path / "model")
    with pytest.raises(RuntimeError, match="on fire"):
        fit(Watched(3, fail), puzzles(), tmp_path / "model", minutes=1)
    assert files(tmp_path / "model") == before


def test_an_interrupt_before_the_first_step_leaves_the_last_save_alone(tmp_path: Path) -> None:
    fit(Watched(2, stop), puzzles(), tmp_path / "model", minutes=1)
    before = files(tmp_path / "model")

    class Early(Watched):
        def on_train_start(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Early(), puzzles(), tmp_path / "model", minutes=1)
    assert files(tmp_path / "model") == before


# --- The optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_only_matrices_decay_and_every_weight_is_trained_once(muon_lr: float | None) -> None:
    model = new_model({**TINY, "attention_bias": True, "qk_norm": True}, character_tokenizer("ab"), 0)
    chosen = Optimizer(weight_decay=0.3, muon_lr=muon_lr).build(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(names[id(p)], group) for group in chosen.param_groups for p in group["params"]]
    assert sorted(name for name, _ in groups) == sorted(names.values())
    vectors = {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert len(vectors) == 3 + 2 + 3  # norms of layer and output; of query and key; biases of query, key and value
    rates = {name: (group["weight_decay"], group["lr"]) for name, group in groups}
    inner = {name for name in names.values() if ".layers." in name} - vectors if muon_lr else set()
    assert len(inner) == (7 if muon_lr else 0)  # query, key, value, output; gate, up, down
    assert rates == {
        name: (0.0 if name in vectors else 0.3, muon_lr if name in inner else 1e-3) for name in names.values()
    }


def test_adam_and_muon_move_weights_as_they_should() -> None:
    """One first step without decay: Adam moves every weight by lr, Muon every direction of a matrix about alike."""
    model = new_model({**TINY, "tie_word_embeddings": True}, character_tokenizer("ab"), 0)
    chosen = Optimizer(lr=1e-3, muon_lr=0.02, weight_decay=0.0).build(model)
    before = weights(model)
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=source)
    chosen.step()
    for name, parameter in model.named_parameters():
        moved, gradient = parameter.detach() - before[name], parameter.grad
        assert gradient is not None
        assert float((moved * gradient).sum()) < 0
        if parameter.ndim == 2 and ".layers." in name:
            sizes = torch.linalg.svdvals(moved)
            assert float(sizes.max() / sizes.min()) < 3
            assert float(torch.linalg.svdvals(gradient).max() / torch.linalg.svdvals(gradient).min()) > 3
        else:
            torch.testing.assert_close(moved, -1e-3 * gradient.sign(), rtol=1e-2, atol=1e-6)


def attach(task: HybridTask, **fields: Any) -> SimpleNamespace:
    """As if a trainer ran the task."""
    data = puzzles()
    data.setup()
    stub = SimpleNamespace(
        datamodule=data, callbacks=[], max_steps=100, max_epochs=-1, global_step=0, strategy=None, **fields
    )  # fmt: skip
    task.trainer = stub
    return stub


@pytest.mark.parametrize(
    ("decay", "warmup", "expected"),
    [
        ("none", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1 - n / 8 for n in range(8)]),
        ("linear", 4, [0.25, 0.5, 0.75, 1.0, 4 / 4, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]),
    ],
)
def test_the_learning_rate_follows_the_steps(
    decay: Any, warmup: int, expected: list[float], tmp_path: Path
) -> None:
    task = Watched(optimizer=Optimizer(lr=0.01, decay=decay, warmup_steps=warmup))
    trainer(tmp_path / "model", 8).fit(task, puzzles())
    assert task.rates == pytest.approx([0.01 * factor for factor in expected])


def test_progress_is_that_of_the_steps_or_the_clock_whichever_is_further() -> None:
    task = HybridTask(config=TINY)
    stub = attach(task)
    stub.global_step = 30
    assert task.progress() == pytest.approx(0.3)
    timer = L.callbacks.Timer(duration={"seconds": 50})
    timer.time_elapsed = lambda *args: 10.0  # type: ignore[method-assign]
    stub.callbacks = [timer]
    assert task.progress() == pytest.approx(0.3)
    timer.time_elapsed = lambda *args: 40.0  # type: ignore[method-assign]
    assert task.progress() == pytest.approx(0.8)
    stub.max_steps = -1
    assert task.progress() == pytest.approx(0.8)
    timer.time_elapsed = lambda *args: 60.0  # type: ignore[method-assign]
    assert task.progress() == 1.0
    assert Optimizer(warmup_steps=0).factor(5, 1.0) == 0.0


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        ({"decay": "linear"}, get_linear_schedule_with_warmup),
        ({"decay": "cosine"}, get_cosine_schedule_with_warmup),
        ({"decay": "cosine", "floor": 0.1}, partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1)),
        ({"decay": "wsd"}, partial(get_wsd_schedule, num_decay_steps=10, decay_type="1-sqrt")),
        (
            {"decay": "wsd", "decay_share": 0.5, "floor": 0.2},
            partial(get_wsd_schedule, num_decay_steps=25, decay_type="1-sqrt", min_lr_ratio=0.2),
        ),
    ],
)
def test_schedules_are_those_of_transformers(given: dict[str, Any], theirs: Callable[..., Any], warmup: int) -> None:
    """From the end of the warm-up on; in it, this one is a step ahead, because their first step has a rate of 0."""
    chosen, steps = Optimizer(warmup_steps=warmup, **given), 50
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = theirs(other, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
    for step in range(steps):
        expected = (step + 1) / warmup if step < warmup else schedule(step)
        assert chosen.factor(step, step / steps) == pytest.approx(expected)
    assert chosen.factor(steps, 1.0) == pytest.approx(schedule(steps))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"decay": "step"}, "decay is 'step'; use 'linear', 'cosine', 'wsd' or 'none'"),
        ({"decay_share": 0.0}, "decay_share is 0.0"),
        ({"floor": 2.0}, "floor is 2.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
    ],
)
def test_settings_of_the_optimizer_are_checked_before_data_are_read(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    class Unread(SudokuData):
        def load(self) -> None:
            raise AssertionError("read")

    with pytest.raises(ValueError, match=said):
        trainer(tmp_path / "model", 1).fit(Watched(optimizer=Optimizer(**given)), Unread())


def test_gradients_are_scaled_down_to_the_norm() -> None:
    task = HybridTask(config=TINY, optimizer=Optimizer(clip_norm=0.5))
    attach(task)
    task.configure_model()
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    parameters = list(task.model.parameters())
    for scale, expected in ((10.0, 0.5), (1e-6, None)):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, scale)
        before = math.sqrt(sum(scale**2 * p.numel() for p in parameters))
        task.configure_gradient_clipping(SimpleNamespace(param_groups=[{"lr": 0.0}]))
        after = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
        assert after == pytest.approx(expected or before, rel=1e-4)


# --- Where a model comes from -------------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone() -> None:
    tokenizer, state = character_tokenizer("ab"), torch.get_rng_state()
    one = new_model(TINY, tokenizer, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    torch.rand(7)
    assert same(weights(one), weights(new_model(TINY, tokenizer, 3)))
    assert not same(weights(one), weights(new_model(TINY, tokenizer, 4)))


def test_a_job_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    start = new_model(TINY, character_tokenizer("1234.="), 9)
    start.save_pretrained(tmp_path / "start")
    task = Watched(config=None, init_from=str(tmp_path / "start"), optimizer=Optimizer(lr=0.0, weight_decay=0.0))
    trainer(tmp_path / "model", 1).fit(task, puzzles())
    assert same(weights(task.model), weights(start))


@pytest.mark.parametrize("given", [{}, {"config": TINY, "init_from": "somewhere"}])
def test_a_task_needs_a_config_or_a_checkpoint_and_not_both(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="config or init_from: give one"):
        HybridTask(**given)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"config": {**TINY, "hidden": 3, "layers": 2}}, "config: hidden, layers is no field"),
        ({"config": {**TINY, "num_attention_heads": 16}}, "head_dim is 1"),
        ({"config": {**TINY, "max_position_embeddings": 33}}, "rows of 34 tokens.*max_position_embeddings is 33"),
        ({"config": {**TINY, "clean_attention": "block"}}, "ar_weight is 1.0.*clean_attention='block'"),
        ({"config": {**TINY, "block_size": 40}}, "block_sizes is .*34"),
        ({"config": TINY, "objective": Objective(noise=Noise(eps=7.0))}, "eps is 7.0"),
        ({"init_from": "{folder}/small"}, "init_from: .*small knows 24 tokens.*makes 32.*own tokenizer"),
        ({"init_from": "{folder}/short"}, "rows of 34 tokens.*max_position_embeddings is 20"),
    ],
)
def test_settings_that_do_not_go_with_the_data_are_named_before_anything_runs(
    task: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "small" in said:
        large = character_tokenizer("1234.=abcdefghijklmnopqrstuvw")
        monkeypatch.setattr(hybrid.training.data, "character_tokenizer", lambda _: large)
    tiny(0).save_pretrained(tmp_path / "small")
    tiny(0, vocab_size=40, max_position_embeddings=20).save_pretrained(tmp_path / "short")
    if "init_from" in task:
        task = {"init_from": task["init_from"].format(folder=tmp_path)}
    with pytest.raises(ValueError, match=said):
        fit(HybridTask(**task), puzzles(), tmp_path / "model", minutes=1)
    assert not (tmp_path / "model").exists()


def test_text_whose_tokens_the_checkpoint_knows_by_other_numbers_is_refused(tmp_path: Path) -> None:
    """Nothing else would show it: the numbers are all in the vocabulary."""
    for name, characters in (("other", "=.4321abc"), ("own", "1234.=abc")):
        tokenizer = character_tokenizer(characters)
        new_model(TINY, tokenizer, 9).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"other has a tokenizer that gives '\.' another id than the data's"):
        fit(HybridTask(init_from=str(tmp_path / "other")), puzzles(), tmp_path / "model", minutes=1)
    trainer(tmp_path / "model", 1).fit(HybridTask(init_from=str(tmp_path / "own")), puzzles())


def test_a_tokenizer_of_the_tasks_own_that_the_data_do_not_speak_is_refused(tmp_path: Path) -> None:
    task = HybridTask(TINY, tokenizer=character_tokenizer("=.4321"))
    with pytest.raises(ValueError, match=r"tokenizer: it gives '\.' another id than the data's own"):
        fit(task, puzzles(), tmp_path / "model", minutes=1)
    trainer(tmp_path / "model", 1).fit(HybridTask(TINY, tokenizer=character_tokenizer("1234.=")), puzzles())


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=character_tokenizer("ab").backend_tokenizer, eos_token="<|eos|>")
    with pytest.raises(ValueError, match=r"no mask token.*mask_token"):
        new_model(TINY, bare, 0)


# --- Recipes ------------------------------------------------------------------------------------------------

# Those that bring their own data; for the others see test_recipes.py, and test_grpo.py for what goes on from these.
RECIPES = sorted(
    entry.name for entry in importlib.resources.files("hybrid.training").joinpath("recipes").iterdir()
    if entry.is_file() and "TextData" not in entry.read_text()
    and "init_from" not in yaml.safe_load(entry.read_text())["model"]
)  # fmt: skip


def recipe(name: str) -> str:
    return str(importlib.resources.files("hybrid.training").joinpath("recipes", name))


def small(name: str, folder: Path) -> list[str]:
    """The recipe, two steps long and with a model of nothing."""
    words = [
        "fit", "--config", recipe(name), "--out", str(folder), "--trainer.max_steps=2", "--trainer.accelerator=cpu",
        "--trainer.precision=32-true", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1", "--data.init_args.batch_size=4", "--model.config.hidden_size=12",
        "--model.config.intermediate_size=16", "--model.config.num_hidden_layers=1",
        "--model.config.num_attention_heads=2",
    ]  # fmt: skip
    made_on_the_spot = name.startswith(("sudoku", "countdown"))
    return [*words, "--data.init_args.count=20"] if made_on_the_spot else words


@pytest.fixture
def little_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pages instead of the standard library: recipes are what is tested here."""
    lines = [f"def function_{n}(argument):\n    return argument * {n}\n\n" for n in range(200)]
    documents = [Document(name=f"{part}.py", text="".join(lines[part::4])) for part in range(4)]
    corpus = Corpus(
        train=tuple(documents[:2]), validation=tuple(documents[2:3]), test=tuple(documents[3:]), overlap={}, moved=0
    )
    monkeypatch.setattr(hybrid.training.data, "load_stdlib", lambda: corpus)


def check_run(name: str, folder: Path) -> None:
    said = yaml.safe_load(Path(recipe(name)).read_text())
    model = HybridForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert model.config.hidden_size == 12
    for field, value in said["model"]["config"].items():  # what was not overridden above is as the recipe says
        if field not in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert getattr(model.config, field) == value
    rows = log_of(folder)
    trained, validated = ([row for row in rows if row.get(f"{stage}/loss")] for stage in ("train", "val"))
    assert [row["step"] for row in trained] == ["0", "1"]
    assert len(validated) == 1
    objective = said["model"]["objective"]
    for part in ("ar", "diffusion"):
        asked = objective.get(f"{part}_weight", 1.0) > 0
        first = objective.get("ar_first", 0.0) if part == "diffusion" else 0.0
        for row in trained:
            assert bool(row.get(f"train/{part}")) == (asked and int(row["step"]) / 2 >= first)
        assert bool(validated[0].get(f"val/{part}")) == asked
    assert (folder.parent / "logs" / folder.name / "config.yaml").exists()
    assert (folder.parent / f"{folder.name}.ckpt").exists()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("little_corpus")
def test_recipes_run(name: str, tmp_path: Path) -> None:
    HybridCLI.run(small(name, tmp_path / "model"))
    check_run(name, tmp_path / "model")


@pytest.mark.slow
def test_a_recipe_runs_on_the_real_corpus(tmp_path: Path) -> None:
    HybridCLI.run(small("stdlib.yaml", tmp_path / "model"))
    check_run("stdlib.yaml", tmp_path / "model")


def test_there_are_recipes() -> None:
    assert {"stdlib.yaml", "sudoku.yaml"} <= set(RECIPES)
    outs = [yaml.safe_load(Path(recipe(name)).read_text())["out"] for name in RECIPES]
    assert len(set(outs)) == len(outs), "no recipe overwrites another's model"


def test_a_recipe_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        HybridTask, "on_train_batch_start", lambda task, batch, _: seen.extend(batch["index"].tolist())
    )
    HybridCLI.run(small("sudoku.yaml", tmp_path / "model"))
    words = small("sudoku.yaml", tmp_path / "model")
    words[words.index("--trainer.max_steps=2")] = "--trainer.max_steps=5"
    found = HybridCLI.run([*words, "--ckpt_path", str(tmp_path / "model.ckpt")])
    assert found.trainer.global_step == 5
    assert seen == list(range(5 * 4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.objective.difusion_weight=1"], "difusion_weight"),
        (["--model.objective.noise.blocksize=4"], "blocksize"),
        (["--data.init_args.lenght=4"], "lenght"),
        (["--trainer.steps=4"], "trainer.steps"),
        (["--wandb=maybe"], "maybe"),
    ],
)
def test_an_unknown_field_is_a_clear_error(
    change: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        HybridCLI.run([*small("sudoku.yaml", tmp_path / "model"), *change])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("field", ["model.objective.noise.colour", "trainer.colour", "colour", "data.init_args.colour"])
def test_an_unknown_field_in_a_recipe_is_a_clear_error(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load(Path(recipe("sudoku.yaml")).read_text())
    *path, last = field.split(".")
    place = document
    for key in path:
        place = place.setdefault(key, {})
    place[last] = 3
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(SystemExit) as ended:
        HybridCLI.run(["fit", "--config", str(tmp_path / "recipe.yaml")])
    assert ended.value.code == 2
    assert "colour" in capsys.readouterr().err


def test_an_unknown_field_of_the_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config: width is no field of HybridConfig"):
        HybridCLI.run([*small("sudoku.yaml", tmp_path / "model"), "--model.config.width=3"])


# --- Validation ---------------------------------------------------------------------------------------------


def test_validation_noise_is_not_that_of_training(tmp_path: Path) -> None:
    """Sample 0 of the held-out rows must not always get the mask that sample 0 of training got."""
    seeds = []

    class Spy(HybridTask):
        def _losses(self, batch: Batch, seed: int) -> Losses:
            seeds.append(seed)
            return super()._losses(batch, seed)

    task, run = Spy(config=TINY, seed=5), trainer(tmp_path / "model", 1)
    run.fit(task, puzzles())
    run.validate(task, puzzles(), verbose=False)
    run.test(task, puzzles(), verbose=False)
    seeds = list(dict.fromkeys(seeds[:2])) + seeds[-1:]
    assert len(set(seeds[:2])) == 2
    assert seeds[1] == seeds[2]
