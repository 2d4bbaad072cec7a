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
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from hybrid.training.checkpoint import read_checkpoint

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Sharded(ModelParallelStrategy):
    """Lightning's strategy, over however many devices and nodes the trainer has."""

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, with what `read_checkpoint` raises; nothing but data is ever loaded."""
        self.lightning_module.check_shapes(read_checkpoint(checkpoint_path)["state_dict"])
        return super().load_checkpoint(checkpoint_path, weights_only=True)


def check_strategy(trainer: L.Trainer) -> None:
    """Raise ValueError for a strategy that does not go with this library or with the callbacks; before any work."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if strategy._save_distributed_checkpoint or strategy._tensor_parallel_size != 1:
        raise ValueError(
            "trainer.strategy: layers are not split, and checkpoints are one file without pickles. Use "
            "hybrid.training.sharding.Sharded, or ModelParallelStrategy with data_parallel_size=PROCESSES, "
            "tensor_parallel_size=1 and save_distributed_checkpoint=false."
        )
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        raise ValueError(
            "trainer.callbacks: averaged weights (EMA) need the whole model in each process, and this strategy divides "
            "it: leave the callback out, or use strategy=ddp."
        )


def shard(task: L.LightningModule, layers: Any) -> None:
    """Divide the task's parameters over its strategy's processes, where it divides them at all."""
    if not isinstance(task.trainer.strategy, ModelParallelStrategy):
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
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


