"""Weights, gradients and optimizer state divided over processes: FSDP2 (PyTorch's `fully_shard`), as a Lightning
strategy.

Each layer is a group that is gathered for its own forward and backward; what stands around the layers (embedding, last
norm, head, which may share one matrix) is gathered for the whole step. A checkpoint is one file of whole tensors,
written by the first process, so that any number of processes can go on with it. PyTorch's format of many files keeps
its index as a pickle, and is refused.
"""

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from hybrid.training.running.checkpoint import read_checkpoint
from hybrid.training.running.innards import bare

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Sharded(ModelParallelStrategy):
    """Lightning's strategy, over however many devices and nodes the trainer has: `--trainer.strategy=sharded`."""

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Lightning numbers the optimizer's parameters in the model's order, which is not that of its groups: it would give
    # one matrix the moments of another.

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state, as `optimizer.state_dict()` has it, in the first process."""
        state: Any = get_optimizer_state_dict(self.model, bare(optimizer), options=WHOLE)
        if self.global_rank:
            return {}
        numbers = {name: n for n, name in enumerate(x for group in state["param_groups"] for x in group["params"])}
        return {
            "state": {numbers[name]: moments for name, moments in state["state"].items()},
            "param_groups": [{**g, "params": [numbers[x] for x in g["params"]]} for g in state["param_groups"]],
        }

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Put weights and moments in place, each process its part of them.

        Raises:
            ValueError: what `read_checkpoint` raises, or the checkpoint is of another model.
        """
        found = read_checkpoint(checkpoint_path, mmap=True)
        self.lightning_module.check_shapes(found["state_dict"])
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, found["state_dict"], options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(map(bare, self.optimizers), found.get("optimizer_states", []), strict=False):
            groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            ids = [n for group in saved["param_groups"] for n in group["params"]]
            name_of = dict(zip(ids, (name for group in groups for name in group), strict=True))
            state: Any = {
                "state": {name_of[n]: moments for n, moments in saved["state"].items()},
                "param_groups": [{**g, "params": x} for g, x in zip(saved["param_groups"], groups, strict=True)],
            }
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return found


StrategyRegistry.register("sharded", Sharded, description="FSDP2 over all devices")


def check_strategy(trainer: L.Trainer) -> None:
    """Raise ValueError for a strategy that does not go with this library or with the callbacks; before any work."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy) or (
        isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, Sharded)
    ):
        raise ValueError(
            f"trainer.strategy: {type(strategy).__name__} saves what cannot be read without pickles, or mixes up the "
            "optimizer's state in this job: use strategy=sharded, which is ModelParallelStrategy "
            "with FSDP2 over all devices."
        )
    if not isinstance(strategy, Sharded):
        return
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        raise ValueError(
            "trainer.callbacks: averaged weights (EMA) need the whole model in each process, and this strategy divides "
            "it: leave the callback out, or use strategy=ddp."
        )


def shard(task: L.LightningModule, layers: Any) -> None:
    """Divide the task's parameters over its strategy's processes, where it divides them at all."""
    if not isinstance(task.trainer.strategy, Sharded):
        return
    mesh = task.device_mesh["data_parallel"]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh)
    for step in STEPS:  # they, and not `forward`, are where a pass through the model begins
        register_fsdp_forward_method(task, step)


def whole_weights(trainer: L.Trainer, model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state as undivided tensors on the CPU; in all processes but the first it may be empty. All processes
    must call this together."""
    if not isinstance(trainer.strategy, Sharded):
        return model.state_dict()
    weights: Any = get_model_state_dict(model, options=WHOLE)
    return dict(weights)


