"""The Lightning job: one model, one objective, one optimizer."""

import math
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.training.data import HybridData
from hybrid.training.objective import Batch, Losses, Objective, losses
from hybrid.training.optimizer import Optimizer


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the weights have not been changed by it."""


class HybridTask(L.LightningModule):
    """Trains a `HybridForCausalLM`.

    Args:
        config: fields of `HybridConfig`; vocabulary and special tokens come from the data's tokenizer.
        init_from: a checkpoint folder or hub name to go on from, instead of `config`.
        objective: what is learned.
        optimizer: how.
        seed: of the weights and of all noise.

    Raises:
        ValueError: settings that do not go together; before any long work starts.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        init_from: str | None = None,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (config is None) == (init_from is None):
            raise ValueError("config or init_from: give one of them, the settings of a new model or a checkpoint.")
        self.config, self.init_from = config, init_from
        self.objective, self.optimizer, self.seed = objective, optimizer, seed
        self.model: HybridForCausalLM | None = None
        self.tokens_seen = self._tokens_learned = 0
        self.found: Losses | None = None  # of the last training batch, for callbacks

    def configure_model(self) -> None:
        if self.model is not None:
            return
        data: HybridData = self.trainer.datamodule
        if self.init_from is not None:
            model = HybridForCausalLM.from_pretrained(self.init_from)
            if model.config.vocab_size < len(data.tokenizer):
                raise ValueError(
                    f"init_from: {self.init_from} knows {model.config.vocab_size} tokens, and the data's tokenizer "
                    f"makes {len(data.tokenizer)}: pass the checkpoint's own tokenizer to the data."
                )
        else:
            model = new_model(self.config or {}, data.tokenizer, self.seed)
        if data.length > model.config.max_position_embeddings:
            raise ValueError(
                f"the data has rows of {data.length} tokens, and max_position_embeddings is "
                f"{model.config.max_position_embeddings}: make rows shorter or the context longer."
            )
        self.objective.check(model.config, data.length)
        self.model = model.train()

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        chosen = self.optimizer.build(self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda n: self.optimizer.factor(n, self.progress()))
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def progress(self) -> float:
        """How much of the job is done, 0 to 1, by steps or by the clock, whichever is further."""
        trainer, done = self.trainer, 0.0
        if trainer.max_steps > 0:
            done = trainer.global_step / trainer.max_steps
        for callback in trainer.callbacks:
            if isinstance(callback, L.callbacks.Timer) and callback._duration:
                done = max(done, callback.time_elapsed() / callback._duration)
        return min(1.0, done)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = self._losses(batch, self.seed)
        if not torch.isfinite(found.total):
            raise NonFiniteError(
                f"the loss is {found.total.item()} at step {self.global_step}; training stopped before it reached the "
                "weights, and the last checkpoint is intact. A lower lr or a longer warm-up is the usual cure."
            )
        self.found = found.detached()
        self.tokens_seen += int((batch["doc"] >= 0).sum()) * self.trainer.world_size
        self._log("train", found, batch)
        self.log("tokens", float(self.tokens_seen))
        return found.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("val", self._losses(batch, self.seed + 1), batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self._tokens_learned

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_shapes(checkpoint.get("state_dict", {}))  # sharded strategies load weights on their own
        self.tokens_seen = self._tokens_learned = checkpoint["tokens_seen"]

    def _check_shapes(self, weights: dict[str, Tensor]) -> None:
        saved, own = ({name: list(value.shape) for name, value in x.items()} for x in (weights, self.state_dict()))
        for name in sorted(saved.keys() | own.keys()) if saved else ():
            if saved.get(name) != own.get(name):
                raise ValueError(
                    f"the checkpoint is of another model: {name} has shape {saved.get(name)} there and {own.get(name)} "
                    "here. Resume with the settings it was trained with, or start from its weights with init_from."
                )

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimizer.clip_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient's norm is {norm.item()} at step {self.global_step}; training stopped before it reached "
                "the weights, and the last checkpoint is intact. A lower lr or a longer warm-up is the usual cure."
            )
        self._tokens_learned = self.tokens_seen  # a step that is not done when saving begins anew on resuming
        self.log("gradient_norm", norm)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def _losses(self, batch: Batch, seed: int) -> Losses:
        assert self.model is not None
        # Held-out figures are those of the settings that the job ends with, or they could not be compared.
        objective = self.objective.at(self.progress() if self.training else 1.0)
        return losses(self.model, batch, objective, seed)

    def _log(self, stage: str, found: Losses, batch: Batch) -> None:
        figures = {"loss": found.total, "ar": found.ar, "diffusion": found.diffusion}
        figures |= {"masked_accuracy": found.masked_accuracy, "z": found.z}
        # A bound where L_diff is a mean over targets; pooled, it is none.
        bound = found.diffusion if self.objective.denominator == "per_token" else None
        bits = 1 / math.log(2) / self.trainer.datamodule.bytes_per_token
        for name, nats in (("ar", found.ar), ("diffusion", bound)):
            figures[f"{name}_bits_per_byte"] = None if nats is None else nats * bits
        for name, value in figures.items():
            if value is not None:
                self.log(
                    f"{stage}/{name}", value, prog_bar=stage == "train" and name in ("ar", "diffusion"),
                    batch_size=len(batch["index"]), sync_dist=stage == "val",
                )  # fmt: skip


def new_model(config: dict[str, Any], tokenizer: Any, seed: int) -> HybridForCausalLM:
    """A model with fresh weights for a tokenizer; the weights depend on `seed` alone.

    Raises:
        ValueError: the tokenizer has no mask token, or a field of `config` is unknown or out of range.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which diffusion needs: add one as its mask_token.")
    if unknown := sorted(set(config) - set(HybridConfig.__annotations__)):
        raise ValueError(f"config: {', '.join(unknown)} is no field of HybridConfig.")
    fields = {
        "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HybridForCausalLM(HybridConfig(**{**fields, **config}))
