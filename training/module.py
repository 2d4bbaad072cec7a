"""The Lightning job: one model, one objective, one optimizer."""

import copy
import math
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.adapter import DraftAdapter
from hybrid.formats import read
from hybrid.training.data import HybridData
from hybrid.training.drafter import Drafter, drafter_losses
from hybrid.training.lora import LoRA
from hybrid.training.objective import Batch, Losses, Objective, losses
from hybrid.training.optimizer import Optimizer
from hybrid.training.processes import of_first, several
from hybrid.training.sharding import Sharded, check_strategy, shard, whole_weights


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the weights have not been changed by it."""


class HybridTask(L.LightningModule):
    """Trains a `HybridForCausalLM`.

    Args:
        config: fields of `HybridConfig`; vocabulary and special tokens come from the data's tokenizer.
        init_from: a checkpoint folder or hub name to go on from, instead of `config`.
        objective: what is learned.
        optimizer: how.
        drafter: leave the model as it is and train an adapter for its drafts instead; the objective is then not used.
        seed: of the weights and of all noise.
        lora: train low-rank deltas beside some maps, and leave all other weights as they are.
        gradient_checkpointing: keep no activations inside the layers, compute them again in the backward pass: less
            memory for about a third more time.
        compile: translate the layers with `torch.compile` (a minute or more at the start). What is saved is the same.

    Raises:
        ValueError: settings that do not go together; before any long work starts.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        init_from: str | None = None,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        drafter: Drafter | None = None,
        seed: int = 0,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if (config is None) == (init_from is None):
            raise ValueError("config or init_from: give one of them, the settings of a new model or a checkpoint.")
        _checked(config or {})
        self.config, self.init_from = config, init_from
        self.objective, self.optimizer, self.seed = objective, optimizer, seed
        if drafter is not None:
            odd = {"lora": lora, "gradient_checkpointing": gradient_checkpointing, "compile": compile}
            if init_from is None:
                raise ValueError("drafter: it is trained beside a finished model: name that in init_from.")
            if names := ", ".join(name for name, value in odd.items() if value):
                raise ValueError(f"drafter: the model beside it is frozen and runs as it is: leave {names} out.")
        self.drafter = drafter
        self.adapter: DraftAdapter | None = None
        self.lora, self.gradient_checkpointing, self.compiled = lora, gradient_checkpointing, compile
        self.model: HybridForCausalLM | None = None
        self.tokens_seen = self._tokens_learned = 0
        self._clock = 0.0
        self.last_losses: Losses | None = None  # of the last training batch, for callbacks
        self._lost = ""  # what was not finite in this process, before all of them heard of it

    def configure_callbacks(self) -> list[L.Callback]:
        """None of its own: it is the hook that Lightning calls first, before data are read."""
        check_strategy(self.trainer)
        self.optimizer.check(sharded=self._sharded)
        data = self.trainer.datamodule
        data.check()
        if self._sharded and self.drafter is not None:
            raise ValueError("trainer.strategy: a drafter is small and is trained undivided; leave the strategy out.")
        if self._sharded and self.trainer.predicting:
            raise ValueError("trainer.strategy: rows are told apart in one process; predict with strategy=auto.")
        tokenizer = getattr(data, "tokenizer", None)  # there already if it need not be trained
        if self.init_from is not None:
            config = read(self.init_from, {})[0]
            if tokenizer is not None:
                self._check_vocabulary(config, tokenizer)
        else:
            config = HybridConfig(**{"mask_token_id": 0, **(self.config or {})})
            if tokenizer is not None:
                _check_mask_token(tokenizer)
        if data.length_asked is not None:
            self._check_length(config, data.length_asked)
        return []

    def _check_vocabulary(self, config: HybridConfig, tokenizer: Any) -> None:
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"init_from: {self.init_from} knows {config.vocab_size} tokens, and the data's tokenizer "
                f"makes {len(tokenizer)}: pass the checkpoint's own tokenizer to the data."
            )

    def _check_length(self, config: HybridConfig, length: int) -> None:
        if length > config.max_position_embeddings:
            raise ValueError(
                f"the data has rows of {length} tokens, and max_position_embeddings is "
                f"{config.max_position_embeddings}: make rows shorter or the context longer."
            )
        if self.drafter is None:
            self.objective.check(config, length)
        else:
            self.drafter.check(config, length)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        data: HybridData = self.trainer.datamodule
        if self.init_from is not None:
            model = HybridForCausalLM.from_pretrained(self.init_from)
            self._check_vocabulary(model.config, data.tokenizer)
        else:
            model = new_model(self.config or {}, data.tokenizer, self.seed)
        self._check_length(model.config, data.length)
        if self.drafter is not None:
            self.adapter = self.drafter.attach(model, self.seed)
        self.model = model.train()
        if self.lora is not None:
            self.lora.insert(self.model, self.seed)
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if self.compiled:
            # One layer is compiled, and its code serves all of them. In place: names of weights stay as they are.
            for layer in self.model.model.layers:
                layer.compile()
        shard(self, self.model.model.layers)

    def adapter_to_save(self) -> DraftAdapter:
        """The adapter in the number format of its file."""
        assert self.adapter is not None and self.drafter is not None
        return copy.deepcopy(self.adapter).to(getattr(torch, self.drafter.save_dtype))

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        chosen = self.optimizer.build(self.model if self.adapter is None else self.adapter)
        schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda n: self.optimizer.factor(n, self.progress()))
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def progress(self) -> float:
        """How much of the job is done, 0 to 1, by steps or by the clock, whichever is further."""
        trainer, done = self.trainer, 0.0
        if trainer.max_steps > 0:
            done = trainer.global_step / trainer.max_steps
        return min(1.0, max(done, self._clock if several() else self._time_passed()))

    def _time_passed(self) -> float:
        """As a share of the trainer's `max_time`; 0 without one."""
        timers = [callback for callback in self.trainer.callbacks if isinstance(callback, L.callbacks.Timer)]
        return max((timer.time_elapsed() / timer._duration for timer in timers if timer._duration), default=0.0)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if several():  # whose clocks differ, and with them the learning rates would
            self._clock = of_first(self._time_passed(), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        found = self._losses(batch, self.seed)
        total = found.total
        if not torch.isfinite(total) and several():
            # Leaving alone, this process would let the others wait in the backward pass. A gradient that is not finite
            # either goes to all of them, and stops them together.
            self._lost, total = f"the loss is {total.item()}", total * math.nan
        elif not torch.isfinite(total):
            self._stop(f"the loss is {total.item()}")
        self.last_losses = found.detached()
        self.tokens_seen += int((batch["doc"] >= 0).sum()) * self.trainer.world_size
        self._log("train", found, batch)
        self.log("tokens", float(self.tokens_seen))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("val", self._losses(batch, self.seed + 1), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("test", self._losses(batch, self.seed + 1), batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """The losses of each row by itself."""
        rows = []
        for place, number in enumerate(batch["index"].tolist()):
            row = slice(place, place + 1)
            one = Batch(
                input_ids=batch["input_ids"][row], target=batch["target"][row], doc=batch["doc"][row],
                index=batch["index"][row],
            )  # fmt: skip
            found = self._losses(one, self.seed + 1)
            figures = {"loss": found.total, "ar": found.ar, "diffusion": found.diffusion}
            told = {name: float(value) for name, value in figures.items() if value is not None}
            rows.append({"row": number, "targets": int(one["target"].sum()), **told})
        return rows

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self._tokens_learned
        if self.adapter is not None:  # the model is where it came from, unchanged
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith("model.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adapter is not None:
            frozen = {k: v for k, v in self.state_dict().items() if k.startswith("model.")}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]
        self.check_shapes(checkpoint.get("state_dict", {}))  # sharded strategies load weights on their own
        self.tokens_seen = self._tokens_learned = checkpoint["tokens_seen"]

    def check_shapes(self, weights: dict[str, Tensor]) -> None:
        """Raise ValueError if a checkpoint's weights are not those of this model."""
        _compare(weights, self.state_dict())

    def check_resumable(self, weights: dict[str, Tensor]) -> None:
        """The same before there is a model, from the settings alone; the vocabulary is taken to be the checkpoint's."""
        if self.config is None:
            return
        table = weights.get("model.model.embed_tokens.weight")
        with torch.device("meta"):
            like = HybridForCausalLM(HybridConfig(**{"vocab_size": 1 if table is None else len(table), **self.config}))
        if self.lora is not None:
            self.lora.insert(like, self.seed)
        _compare(weights, {f"model.{name}": weight for name, weight in like.state_dict().items()})

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        learned = [weight for weight in self.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in learned if weight.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            self._stop(self._lost or f"the gradient's norm is {norm.item()}")
        torch.nn.utils.clip_grads_with_norm_(learned, self.optimizer.clip_norm, norm)
        self._tokens_learned = self.tokens_seen  # a step that is not done when saving begins anew on resuming
        self.log("gradient_norm", norm)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def _stop(self, what: str) -> NoReturn:
        raise NonFiniteError(
            f"{what} at step {self.global_step}; training stopped before it reached the weights, and the last "
            "checkpoint is intact. A lower lr or a longer warm-up is the usual cure."
        )

    def whole_model(self) -> tuple[HybridForCausalLM, dict[str, Tensor]]:
        """The model as it is saved, undivided and with deltas merged, and the weights it comes from.

        Where weights are divided, all processes must call this together, and only the first can use what it gets.
        """
        assert self.model is not None
        state = whole_weights(self.trainer, self.model)
        if self.lora is None and not self._sharded:
            return self.model, state
        with torch.device("meta"):
            found = HybridForCausalLM(self.model.config)
        if self.trainer.is_global_zero:
            found.load_state_dict(state if self.lora is None else self.lora.merged(state), assign=True)
            found.tie_weights()
        found.generation_config = self.model.generation_config
        return found, state

    @property
    def _sharded(self) -> bool:
        return isinstance(self.trainer.strategy, Sharded)

    def _losses(self, batch: Batch, seed: int) -> Losses:
        assert self.model is not None
        if self.drafter is not None:
            assert self.adapter is not None
            return drafter_losses(self.model, self.adapter, batch, self.drafter, seed)
        # Held-out figures are those of the settings that the job ends with, or they could not be compared.
        objective = self.objective.at(self.progress() if self.training else 1.0)
        return losses(self.model, batch, objective, seed)

    def _log(self, stage: str, found: Losses, batch: Batch) -> None:
        figures = {"loss": found.total, "ar": found.ar, "diffusion": found.diffusion}
        figures |= {"masked_accuracy": found.masked_accuracy, "z": found.z, "kept": found.kept}
        # A bound where L_diff is a mean over targets; pooled, it is none.
        bound = found.diffusion if self.objective.denominator == "per_token" and self.drafter is None else None
        bits = 1 / math.log(2) / self.trainer.datamodule.bytes_per_token
        for name, nats in (("ar", found.ar), ("diffusion", bound)):
            figures[f"{name}_bits_per_byte"] = None if nats is None else nats * bits
        for name, value in figures.items():
            if value is not None:
                self.log(
                    f"{stage}/{name}", value, prog_bar=stage == "train" and name in ("ar", "diffusion"),
                    batch_size=len(batch["index"]), sync_dist=stage != "train" or self._logged_now,
                )  # fmt: skip


    @property
    def _logged_now(self) -> bool:
        """Whether this step's figures will be seen: only then it is worth the time to ask the other processes."""
        return bool((self.global_step + 1) % self.trainer.log_every_n_steps == 0)


def new_model(config: dict[str, Any], tokenizer: Any, seed: int) -> HybridForCausalLM:
    """A model with fresh weights for a tokenizer; the weights depend on `seed` alone.

    Raises:
        ValueError: the tokenizer has no mask token, or a field of `config` is unknown or out of range.
    """
    _check_mask_token(tokenizer)
    _checked(config)
    fields = {
        "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HybridForCausalLM(HybridConfig(**{**fields, **config}))


def _check_mask_token(tokenizer: Any) -> None:
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which diffusion needs: add one as its mask_token.")


def _checked(config: dict[str, Any]) -> None:
    if unknown := sorted(set(config) - set(HybridConfig.__annotations__)):
        raise ValueError(f"config: {', '.join(unknown)} is no field of HybridConfig.")
    HybridConfig(**config)


def _compare(weights: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    saved, own = ({name: list(value.shape) for name, value in x.items()} for x in (weights, model))
    for name in sorted(saved.keys() | own.keys()) if saved else ():
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"the checkpoint is of another model: {name} has shape {saved.get(name)} there and {own.get(name)} "
                "here. Resume with the settings it was trained with, or start from its weights with init_from."
            )
