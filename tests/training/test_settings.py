"""What changes how a job computes or what it saves, and not what it learns: averages, low rank, memory, speed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_job import CONFIG
from torch import Tensor
from transformers import AutoTokenizer

from hybrid import HybridForCausalLM, Layout
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.adapters.lora import ATTENTION_AND_MLP, LoRA
from hybrid.law import MODES
from hybrid.training.callbacks import SaveModel
from hybrid.training.data import SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.optimizer import Optimizer
from hybrid.training.running.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")
QUICK = Optimizer(lr=1e-2, warmup_steps=1, decay="none")
TWO_LAYERS = {**CONFIG, "num_hidden_layers": 2}


class Noting(HybridTask):
    """Notes losses, and the weights after each step."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"config": TWO_LAYERS, "optimizer": QUICK, **given})
        self.found: list[float] = []
        self.steps: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.found.append(loss.item())
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.model is not None
        self.steps.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})


def fit(
    folder: Path, task: Noting, steps: int, *callbacks: L.Callback, resume: bool = False, **given: Any
) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[SaveModel(str(folder)), *callbacks],
        **{"limit_val_batches": 0, **given},
    )  # fmt: skip
    trainer.fit(task, SudokuData(count=40, batch_size=4), ckpt_path=f"{folder}.ckpt" if resume else None)
    return trainer


def saved(folder: Path) -> dict[str, Tensor]:
    return HybridForCausalLM.from_pretrained(folder).state_dict()


# --- Averaged weights ---------------------------------------------------------------------------------------


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.8, use_buffers=False)


def test_the_folder_has_averages_and_the_checkpoint_both(tmp_path: Path) -> None:
    task = Noting()
    fit(tmp_path / "model", task, 5, ema())
    expected = task.steps[0]  # the first step begins the average
    for weights in task.steps[1:]:
        expected = {name: 0.8 * value + 0.2 * weights[name] for name, value in expected.items()}
    folder, state = saved(tmp_path / "model"), read_checkpoint(tmp_path / "model.ckpt")
    assert task.model is not None
    for name, value in expected.items():
        torch.testing.assert_close(folder[name], value)
        assert not torch.allclose(value, task.steps[-1][name])
        assert torch.equal(state["state_dict"][f"model.{name}"], folder[name])
        assert torch.equal(state["current_model_state"][f"model.{name}"], task.steps[-1][name])
        assert torch.equal(task.model.get_parameter(name), folder[name]), "what fit leaves in memory is the average"


def test_a_resumed_job_averages_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, second = Noting(), Noting()
    fit(tmp_path / "whole", whole, 7, ema(), limit_val_batches=1, val_check_interval=2)
    fit(tmp_path / "parts", Noting(), 3, ema(), limit_val_batches=1, val_check_interval=2)
    fit(tmp_path / "parts", second, 7, ema(), resume=True, limit_val_batches=1, val_check_interval=2)
    assert second.found == whole.found[3:]
    expected, found = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_averages_must_be_listed_behind_what_saves_both(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[ema(), SaveModel(str(tmp_path / "model"))],
    )  # fmt: skip
    with pytest.raises(ValueError, match="List it behind SaveModel"):
        trainer.fit(Noting(), SudokuData(count=40, batch_size=4))


# --- Low rank -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to go on from."""
    folder = tmp_path_factory.mktemp("base") / "model"
    fit(folder, Noting(), 2)
    return folder


def two_streams(model: HybridForCausalLM) -> tuple[Tensor, Layout]:
    ids = torch.randint(3, 9, (2, 8), generator=torch.Generator().manual_seed(0))
    place = torch.arange(8).expand(2, 8)
    noisy = ids.clone()
    noisy[:, 5:] = model.config.mask_token_id
    return torch.cat([ids, noisy], 1), Layout.causal(place).cat(Layout.of(place, place // 4 * 4, 1))


def test_low_rank_trains_deltas_alone_and_saves_a_plain_model(base: Path, tmp_path: Path) -> None:
    task = Noting(config=None, init_from=str(base), lora=LoRA(rank=3, alpha=6.0, targets=("q_proj", "down_proj")))
    fit(tmp_path / "model", task, 4)
    before, folder = saved(base), saved(tmp_path / "model")
    state = read_checkpoint(tmp_path / "model.ckpt")["state_dict"]
    assert before.keys() == folder.keys()
    for name, weight in before.items():
        assert torch.equal(state[f"model.{name}"], weight), "the model itself stays as it is"
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            assert torch.equal(folder[name], weight)
            continue
        down, up = (state[f"model.{name.removesuffix('weight')}{part}"].double() for part in ("lora_A", "lora_B"))
        assert down.shape[0] == up.shape[1] == 3
        assert up.abs().max() > 0
        torch.testing.assert_close(folder[name].double(), weight.double() + 6.0 / 3 * up @ down, rtol=1e-5, atol=1e-7)
    (moments,) = read_checkpoint(tmp_path / "model.ckpt")["optimizer_states"]
    assert len(moments["state"]) == 2 * 2 * 2, "of two maps in two layers"

    assert task.model is not None
    plain = HybridForCausalLM.from_pretrained(tmp_path / "model")
    ids, layout = two_streams(plain)
    with torch.no_grad():
        expected = task.model.eval()(ids, layout=layout).logits
        torch.testing.assert_close(plain(ids, layout=layout).logits, expected, rtol=1e-4, atol=1e-5)
        untrained = HybridForCausalLM.from_pretrained(base)(ids, layout=layout).logits
        assert not torch.allclose(untrained, expected, atol=1e-3)
    AutoTokenizer.from_pretrained(tmp_path / "model")
    # The deltas alone, as anybody else would read them.
    adapter = DraftAdapter.from_pretrained(tmp_path / "model" / "adapter", plain)
    assert (adapter.rank, adapter.alpha, set(adapter.targets)) == (3, 6.0, {"q_proj", "down_proj"})


def test_peft_says_with_the_deltas_what_the_merged_model_says(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    fit(tmp_path / "model", Noting(config=None, init_from=str(base), lora=LoRA(rank=2)), 3)
    merged = HybridForCausalLM.from_pretrained(tmp_path / "model")
    loaded = peft.PeftModel.from_pretrained(HybridForCausalLM.from_pretrained(base), tmp_path / "model" / "adapter")
    ids, layout = two_streams(merged)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids, layout=layout).logits, merged(ids, layout=layout).logits, rtol=1e-4, atol=1e-5
        )


def test_what_is_decoded_feels_the_deltas_that_are_trained(base: Path) -> None:
    lora, (model, merged, plain) = LoRA(rank=2), (HybridForCausalLM.from_pretrained(base) for _ in range(3))
    lora.insert(model, 0)
    source = torch.Generator().manual_seed(0)
    for name, delta in model.named_parameters():
        if name.endswith("lora_B"):
            delta.data += torch.randn(delta.shape, generator=source)
    merged.load_state_dict(lora.merged(model.state_dict()), strict=False)
    ids = torch.randint(4, plain.config.vocab_size, (2, 6), generator=source)
    for mode in MODES:
        text, want, before = (m.generate(ids, mode=mode, max_new_tokens=8) for m in (model, merged, plain))
        assert torch.equal(text, want) and not torch.equal(text, before)


def test_a_resumed_low_rank_job_goes_on(base: Path, tmp_path: Path) -> None:
    def task() -> Noting:
        return Noting(config=None, init_from=str(base), lora=LoRA(rank=2))

    whole, second = task(), task()
    fit(tmp_path / "whole", whole, 5)
    fit(tmp_path / "parts", task(), 2)
    fit(tmp_path / "parts", second, 5, resume=True)
    assert second.found == whole.found[2:]
    expected, found = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_deltas_begin_as_nothing_and_depend_on_the_seed_alone(base: Path) -> None:
    plain = HybridForCausalLM.from_pretrained(base)
    ids, layout = two_streams(plain)
    state = torch.get_rng_state()
    models = [HybridForCausalLM.from_pretrained(base) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        LoRA(rank=2).insert(model, seed)
    assert torch.equal(torch.get_rng_state(), state)
    trained = {name for name, weight in models[0].named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * len(ATTENTION_AND_MLP)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in trained)
    assert any(not torch.equal(first[name], other[name]) for name in trained)
    with torch.no_grad():
        assert torch.equal(models[0](ids, layout=layout).logits, plain(ids, layout=layout).logits)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("q_proj", "wq")}, "lora.targets: .*no linear map named wq"),
    ],
)
def test_low_rank_settings_that_do_not_fit_are_named(given: dict[str, Any], said: str, base: Path) -> None:
    with pytest.raises(ValueError, match=said):
        LoRA(**given).insert(HybridForCausalLM.from_pretrained(base), 0)


# --- Memory and speed ---------------------------------------------------------------------------------------


def kept(run: Callable[[], Any]) -> int:
    """Bytes that the forward keeps for the backward."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


def test_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    data = SudokuData(count=40, batch_size=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    found = []
    for checkpointing in (False, True):
        task = Noting(gradient_checkpointing=checkpointing, config={**CONFIG, "num_hidden_layers": 6})
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(task)
        trainer.datamodule = data
        task._trainer = trainer
        task.configure_model()
        loss: list[Tensor] = []
        size = kept(lambda task=task, loss=loss: loss.append(task._losses(batch, 0).total))
        loss[0].backward()
        found.append((size, loss[0].item(), {name: p.grad for name, p in task.named_parameters()}))
    (plain, loss_one, gradients), (less, loss_two, others) = found
    assert loss_one == loss_two
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, others[name])
    assert less < plain / 3


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_job_learns_and_saves_the_same(checkpointing: bool, tmp_path: Path) -> None:
    """Either goes on from the other's checkpoint."""
    plain, compiled = Noting(), Noting(compile=True, gradient_checkpointing=checkpointing)
    fit(tmp_path / "plain", plain, 4)
    fit(tmp_path / "compiled", compiled, 4)
    assert compiled.found == pytest.approx(plain.found, rel=1e-5)
    one, other = (read_checkpoint(tmp_path / f"{name}.ckpt") for name in ("plain", "compiled"))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    torch.testing.assert_close(saved(tmp_path / "compiled"), saved(tmp_path / "plain"), rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"

    again = [Noting(), Noting(compile=True, gradient_checkpointing=checkpointing)]
    fit(tmp_path / "compiled", again[0], 6, resume=True)
    fit(tmp_path / "plain", again[1], 6, resume=True)
    assert again[0].found == pytest.approx(again[1].found, rel=1e-4)
    model = HybridForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.generate(torch.tensor([[1, 3, 4]]), mode="block", max_new_tokens=4).shape == (1, 7)
