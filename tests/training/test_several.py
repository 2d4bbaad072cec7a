"""A job in several processes is the job in one: the same samples, losses and checkpoints, and one end for all."""

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import several
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from hybrid import HybridForCausalLM
from hybrid.training.running.checkpoint import read_checkpoint
from hybrid.training.running.sharding import check_strategy

Notes = list[dict[str, Any]]  # of each process
Run = Callable[..., tuple[Path, Notes]]
KINDS: dict[str, dict[str, Any]] = {
    "one": {}, "ddp": {"processes": 2, "strategy": "ddp"}, "sharded": {"processes": 2, "strategy": "sharded"},
}  # fmt: skip
TWO = ["ddp", "sharded"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    server = subprocess.Popen(
        [sys.executable, several.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert server.stdin is not None and server.stdout is not None

    def one(kind: str = "one", steps: int = 4, **given: Any) -> tuple[Path, Notes]:
        folder = tmp_path_factory.mktemp(kind)
        job = {"folder": str(folder), "steps": steps, **KINDS[kind], **given}
        print(json.dumps(job), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        assert not any(codes), f"a process failed, or waited for ever ({-signal.SIGALRM}): {codes}"
        return folder, [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(len(codes))]

    yield one
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="module")
def four(run: Run) -> dict[str, tuple[Path, Notes]]:
    """The first four steps of one job, in every way to run it."""
    return {kind: run(kind) for kind in KINDS}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return HybridForCausalLM.from_pretrained(folder / "model").state_dict()


@slow
@pytest.mark.parametrize("kind", TWO)
def test_losses_gradients_and_weights_are_those_of_one_process(kind: str, four: dict[str, tuple[Path, Notes]]) -> None:
    (folder, notes), (reference, (alone,)) = four[kind], four["one"]
    assert all(process["error"] == "" for process in [alone, *notes])
    for process in notes:
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert process["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert process["tokens"] == alone["tokens"]
    for step, samples in enumerate(alone["seen"]):
        assert sorted(n for process in notes for n in process["seen"][step]) == samples
    expected = weights(reference)
    assert expected.keys() == weights(folder).keys()
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("kind", "accumulate"), [("ddp", 1), pytest.param("sharded", 1, marks=slow), ("ddp", 3)])
def test_a_step_is_one_mean_over_all_processes(kind: str, accumulate: int, run: Run) -> None:
    """Plain batches of conversations: what one process learns much of, the other learns little of."""
    given: dict[str, Any] = {"steps": 2, "precision": "64-true", "uneven": True, "batch_size": 6 // accumulate}
    _, (alone,) = run(**{**given, "batch_size": 6})
    _, notes = run(kind, accumulate=accumulate, **given)
    for process in notes:
        assert process["error"] == ""
        assert process["norms"] == pytest.approx(alone["norms"], rel=1e-6)
        assert process["tokens"] == alone["tokens"]
    numbers = [n for process in notes for batch in process["seen"] for n in batch]
    assert sorted(numbers) == sorted(n for batch in alone["seen"] for n in batch) == list(range(12))
    if accumulate == 1:
        assert notes[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)


def test_what_the_model_writes_is_shared_out_too(run: Run) -> None:
    """Each process writes behind its own prompts, and all learn what one would; weights that are divided write nothing,
    and that is said first."""
    grpo = {"reward": "own_parts.ones", "group": 3, "inner_steps": 2, "max_new_tokens": 5, "kl_weight": 0.5}
    given: dict[str, Any] = {"steps": 3, "precision": "64-true", "grpo": grpo, "held_out": 13}
    (alone,), notes = run(**given)[1], run("ddp", **given)[1]
    assert alone["norms"][0] > 1e-3
    for process in notes:
        assert process["error"] == ""
        assert process["norms"] == pytest.approx(alone["norms"], rel=1e-6)
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-6, abs=1e-9)
        assert process["scored"] == pytest.approx(alone["scored"], rel=1e-6, abs=1e-9)
    assert 0 < alone["scored"]["val/reward"] < 1 and alone["scored"]["val/kl"] > 0
    for process in run("sharded", grpo=grpo)[1]:
        assert process["seen"] == [] and "GRPO: each process writes with the whole model" in process["error"]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("sharded", marks=slow)])
def test_held_out_figures_are_those_of_one_process(kind: str, run: Run) -> None:
    """Of 13 rows the last batches are uneven, and one process has a row less."""
    given: dict[str, Any] = {"steps": 1, "precision": "64-true", "held_out": 13}
    (alone,), notes = run(**given)[1], run(kind, **given)[1]
    assert alone["scored"]["val/ar"] > 1
    for process in notes:
        assert process["error"] == "" and process["scored"] == pytest.approx(alone["scored"], rel=1e-6)


@slow
@pytest.mark.parametrize("kind", TWO)
def test_the_checkpoint_is_that_of_one_process(kind: str, four: dict[str, tuple[Path, Notes]]) -> None:
    """Every weight and every moment, under its own name and number."""
    found, expected = (read_checkpoint(four[x][0] / "model.ckpt") for x in (kind, "one"))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-3, atol=2e-5)
    (moments,), (reference,) = found["optimizer_states"], expected["optimizer_states"]
    assert [g["params"] for g in moments["param_groups"]] == [g["params"] for g in reference["param_groups"]]
    torch.testing.assert_close(moments["state"], reference["state"], rtol=1e-2, atol=1e-5)


@slow
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_any_number_of_processes_goes_on_from_any(
    before: str, after: str, run: Run, four: dict[str, tuple[Path, Notes]]
) -> None:
    _, (expected,) = run(steps=6, resume=str(four["one"][0] / "model.ckpt"))
    _, notes = run(after, steps=6, resume=str(four[before][0] / "model.ckpt"))
    for process in notes:
        assert process["error"] == ""
        assert process["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert process["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert sorted(n for process in notes for samples in process["seen"] for n in samples) == list(range(32, 48))


@slow
@pytest.mark.parametrize("kind", TWO)
def test_what_is_not_finite_in_one_process_ends_all_before_the_weights(kind: str, run: Run) -> None:
    """The second process meets an infinite loss in its third step."""
    folder, notes = run(kind, poison=[1, 2])
    assert [process["error"].split(" at step")[0] for process in notes] == [
        "NonFiniteError: the gradient's norm is nan", "NonFiniteError: the loss is inf",
    ]  # fmt: skip
    assert all(process["step"] == 2 and math.isnan(process["losses"][-1]) for process in notes)
    assert not (folder / "model").exists()


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_is_asked_to_end_ends_all(number: int, rank: int, run: Run) -> None:
    """They save the step they were in, and nobody waits."""
    folder, notes = run("sharded", end=[rank, 1, number])
    assert all(process["error"] == "SystemExit" and process["step"] == 2 for process in notes)
    assert read_checkpoint(folder / "model.ckpt")["global_step"] == 2
    _, (resumed,) = run(steps=3, resume=str(folder / "model.ckpt"))
    assert resumed["seen"] == [list(range(16, 24))]


@slow
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("room", [2_000, 40_000])  # too little for the model, and for the checkpoint alone
def test_a_full_disk_is_told_in_every_process(kind: str, room: int, run: Run) -> None:
    folder, notes = run(kind, room=room)
    said = "model could not be written" if room == 2_000 else r"model.ckpt could not be written"
    assert all("SaveError" in process["error"] and said in process["error"] for process in notes)
    assert not (folder / "model.ckpt").exists()
    assert (folder / "model").exists() == (room == 40_000)


@slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ema": True}, "averaged weights .EMA. need the whole model.*strategy=ddp"),
        ({"muon_lr": 0.02}, "muon_lr: Muon needs whole matrices.*strategy=ddp"),
        ({"config": {"hidden_size": 24}, "resume": "model.ckpt"}, "of another model: .*16.*there and.*24.* here"),
        ({"resume": "model"}, "is a folder; give the .ckpt file"),
    ],
)
def test_what_does_not_go_with_divided_weights_is_refused_first(
    given: dict[str, Any], said: str, run: Run, four: dict[str, tuple[Path, Notes]]
) -> None:
    if "resume" in given:
        given = {**given, "resume": str(four["sharded"][0] / given["resume"])}
    for process in run("sharded", **given)[1]:
        assert process["seen"] == []
        assert process["error"].startswith("ValueError")
        assert re.search(said, process["error"])


@slow
def test_the_clock_is_that_of_the_first_process(run: Run) -> None:
    """Else each would have its own learning rate, and soon its own weights."""
    _, (one, other) = run("ddp", steps=-1, seconds=12)
    assert len(one["rates"]) > 3
    assert one["rates"][-1] < one["rates"][2]
    assert one["rates"] == other["rates"]


@slow
def test_a_job_goes_on_with_other_batches(run: Run, four: dict[str, tuple[Path, Notes]]) -> None:
    """Larger ones, more of them a step, and one process more: the stream goes on where it was."""
    _, notes = run("ddp", steps=6, batch_size=12, accumulate=2, resume=str(four["one"][0] / "model.ckpt"))
    steps = [sorted(n for process in notes for batch in process["seen"][i : i + 2] for n in batch) for i in (0, 2)]
    assert steps == [list(range(32, 56)), list(range(56, 80))]
    assert all(process["step"] == 6 and len(process["norms"]) == 2 for process in notes)


@slow
@pytest.mark.parametrize(
    "given", [{"lora": {"rank": 2}}, {"precision": "bf16-mixed"}, {"checkpointing": True}, {"accumulate": 2}], ids=str
)
def test_other_settings_are_the_same_divided(given: dict[str, Any], run: Run) -> None:
    reference, (alone,) = run(**given)
    folder, notes = run("sharded", **given)
    near = 1e-3 if "precision" in given else 1e-5
    for process in notes:
        assert process["error"] == ""
        assert process["losses"] == pytest.approx(alone["losses"], rel=near)
        assert process["norms"] == pytest.approx(alone["norms"], rel=10 * near)
    found, expected = weights(folder), weights(reference)
    assert found.keys() == expected.keys()
    if "precision" not in given:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_save_pickles_are_refused(strategy: Any) -> None:
    trainer = L.Trainer.__new__(L.Trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "strategy", strategy)
        with pytest.raises(ValueError, match=r"trainer.strategy: .*use strategy=sharded"):
            check_strategy(trainer)
