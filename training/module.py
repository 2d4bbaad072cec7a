"""The Lightning job: one model, one objective, one optimizer."""

import math
from dataclasses import replace
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.checkpoints.folder import load_tokenizer
from hybrid.checkpoints.shipped import place as shipped_place
from hybrid.formats import read
from hybrid.texts import decode
from hybrid.training.batch import Batch, as_batch
from hybrid.training.component import Component, Losses, Means, wide
from hybrid.training.data import HybridData
from hybrid.training.lora import LoRA
from hybrid.training.objective import Objective
from hybrid.training.optimizer import Optimizer
from hybrid.training.running.ahead import rest_of_step
from hybrid.training.running.checkpoint import read_checkpoint
from hybrid.training.running.processes import of_first, several, summed
from hybrid.training.running.settings import plain, revived
from hybrid.training.running.sharding import Sharded, check_strategy, shard, whole_weights
from hybrid.training.text.rows import NOBODY


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the weights have not been changed by it."""


class HybridTask(L.LightningModule):
    """Trains a `HybridForCausalLM` on whatever gives batches: `HybridData`, any other data module, or loaders.

    Args:
        config: fields of `HybridConfig`; vocabulary and special tokens come from the tokenizer, where there is one.
        init_from: a checkpoint folder or hub name to go on from, instead of `config`.
        objective: what is learned; `Drafter`, say, leaves the model as it is and trains an adapter for its drafts.
        optimizer: how.
        seed: of the weights and of all noise.
        lora: train low-rank deltas beside some maps, and leave all other weights as they are.
        gradient_checkpointing: keep no activations inside the layers, compute them again in the backward pass: less
            memory for about a third more time.
        compile: translate the layers with `torch.compile` (a minute or more at the start). What is saved is the same.
        tokenizer: a folder or hub name, or a tokenizer; None is the data's, where they have one. Without any, `config`
            has vocab_size and mask_token_id.

    Raises:
        ValueError: settings that do not go together; before any long work starts.
    """

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        init_from: str | None = None,
        objective: Component = Objective(),  # noqa: B008 (frozen)
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        seed: int = 0,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        if (config is None) == (init_from is None):
            raise ValueError("config or init_from: give one of them, the settings of a new model or a checkpoint.")
        _checked(config or {})
        self.config, self.init_from = config, init_from
        self.objective, self.optimizer, self.seed = objective, optimizer, seed
        if objective.keeps_model:
            name = type(objective).__name__
            odd = {"lora": lora, "gradient_checkpointing": gradient_checkpointing, "compile": compile}
            if init_from is None:
                raise ValueError(f"{name}: it is trained beside a finished model: name that in init_from.")
            if names := ", ".join(option for option, value in odd.items() if value):
                raise ValueError(f"{name}: the model beside it is frozen and runs as it is: leave {names} out.")
        self.lora, self.gradient_checkpointing, self.compiled = lora, gradient_checkpointing, compile
        self._tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        given = {
            "config": config, "init_from": init_from, "objective": objective, "optimizer": optimizer, "seed": seed,
            "lora": lora, "gradient_checkpointing": gradient_checkpointing, "compile": compile,
            "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
        }  # fmt: skip
        self.save_hyperparameters({name: plain(value) for name, value in given.items()})
        self.model: HybridForCausalLM | None = None
        self.beside: nn.Module | None = None  # what the objective keeps beside the model, if anything
        self.tokens_seen = self._tokens_learned = 0
        self._rows_seen = self._rows_learned = 0  # of all processes: rows without a number of their own go on from here
        self._clock = self._begun_at = 0.0
        self._counts: dict[str, Tensor] = {}  # of the step that is being made
        self._means = Means()
        self._held_out: dict[int, Means] = {}
        self._held_out_rows = 0
        self.last_losses: Losses | None = None  # of the last training batch, for callbacks
        self._lost = ""  # what was not finite in this process, before all of them heard of it

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **given: Any) -> "HybridTask":
        """The task as a job's checkpoint has it, with its model. Nothing in the file is run.

        Args:
            given: arguments of the task that go above those of the checkpoint. What was of a class of one's own (an
                objective, say) has to be among them.

        Raises:
            ValueError: the file is no checkpoint of such a task, or needs something to be given.
        """
        found = read_checkpoint(checkpoint_path)
        if not {"hyper_parameters", "model_config"} <= found.keys():
            raise ValueError(f"{checkpoint_path} does not say what model it is of: load the folder beside it instead.")
        saved = {name: value for name, value in found["hyper_parameters"].items() if name not in given}
        task = cls(**{**{name: revived(value) for name, value in saved.items()}, **given})
        if task.objective.keeps_model:
            model = task._start()
        else:
            with torch.random.fork_rng(devices=[]):
                model = HybridForCausalLM(HybridConfig(**found["model_config"]))
        task._take(model)
        task.on_load_checkpoint(found)
        task.load_state_dict(found["state_dict"])
        return task if map_location is None else task.to(map_location)

    @property
    def lr(self) -> float:
        """The learning rate, by the name that Lightning's tuner looks for."""
        return self.optimizer.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer = replace(self.optimizer, lr=value)

    @property
    def data(self) -> HybridData | None:
        """The job's data, where they are of this library."""
        found = getattr(self.trainer, "datamodule", None)
        return found if isinstance(found, HybridData) else None

    @property
    def tokenizer(self) -> Any:
        """This task's, or the data's; None if neither has one, or the data have still to make it."""
        if self._tokenizer is not None or self._trainer is None:
            return self._tokenizer
        return getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)

    def configure_callbacks(self) -> list[L.Callback]:
        """None of its own: it is the hook that Lightning calls first, before data are read."""
        check_strategy(self.trainer)
        self.optimizer.check(sharded=self._sharded)
        if self._sharded and (why := self.objective.whole_model):
            raise ValueError(f"trainer.strategy: {why}; leave the strategy out.")
        if self._sharded and self.trainer.predicting:
            raise ValueError("trainer.strategy: rows are told apart in one process; predict with strategy=auto.")
        data = self.data
        if data is not None:
            data.check()
        if self.init_from is not None:
            config = read(shipped_place(self.init_from), {})[0]
            self._check_vocabulary(config)
        else:
            config = HybridConfig(**{"mask_token_id": 0, **(self.config or {})})
            if self.tokenizer is not None:
                _check_mask_token(self.tokenizer)
        length = config.max_position_embeddings if data is None else data.length_asked
        if length is not None:
            self._check_length(config, length)
        return []

    def _check_vocabulary(self, config: HybridConfig) -> None:
        if self.tokenizer is not None and config.vocab_size < len(self.tokenizer):
            raise ValueError(
                f"init_from: {self.init_from} knows {config.vocab_size} tokens, and the data's tokenizer "
                f"makes {len(self.tokenizer)}: pass the checkpoint's own tokenizer to the data."
            )

    def _check_length(self, config: HybridConfig, length: int) -> None:
        if length > config.max_position_embeddings:
            raise ValueError(
                f"the data has rows of {length} tokens, and max_position_embeddings is "
                f"{config.max_position_embeddings}: make rows shorter or the context longer."
            )
        self.objective.check(config, length)

    def configure_model(self) -> None:
        if self.model is None:
            self._make()
        self.objective.prepare(self.tokenizer, self.beside)

    def _make(self) -> None:
        if self.init_from is not None:
            model = self._start()
            self._check_vocabulary(model.config)
        else:
            model = new_model(self.config or {}, self.tokenizer, self.seed)
        data = self.data
        self._check_length(model.config, model.config.max_position_embeddings if data is None else data.length)
        self._take(model)
        shard(self, model.model.layers)

    def _start(self) -> HybridForCausalLM:
        """The checkpoint that the job begins with. What is trained is float32, whatever the file has: steps are often
        smaller than what bfloat16 can tell from nothing."""
        options: dict[str, Any] = {} if self.objective.keeps_model else {"dtype": torch.float32}
        model: HybridForCausalLM = HybridForCausalLM.from_pretrained(self.init_from, **options)
        return model

    def _take(self, model: HybridForCausalLM) -> None:
        """Make `model` the one that is trained."""
        if self.lora is not None:
            self.lora.insert(model, self.seed)
        self.beside = self.objective.attach(model, self.seed)
        self.model = model.train()
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if self.compiled:
            # One layer is compiled, and its code serves all of them. In place: names of weights stay as they are.
            for layer in self.model.model.layers:
                layer.compile()

    def artifact(self) -> Any:
        """What is saved in place of the model, where the objective trains something else."""
        assert self.model is not None
        return self.objective.artifact(self.model, self.beside) if self.objective.keeps_model else None

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        learned = self.beside if self.objective.keeps_model else self.model
        assert learned is not None
        chosen = self.optimizer.build(learned)
        schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda n: self.optimizer.factor(n, self.progress()))
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def progress(self) -> float:
        """How much of the job is done, 0 to 1: by steps, by epochs or by the clock, whichever is furthest."""
        trainer, done = self.trainer, 0.0
        if trainer.max_steps > 0:
            done = trainer.global_step / trainer.max_steps
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            done = max(done, self._epochs_passed() / trainer.max_epochs)
        return min(1.0, max(done, self._clock if several() else self._time_passed()))

    def _epochs_passed(self) -> float:
        """Epochs and the share of this one, in whole steps; of loaders whose length is not known, only epochs."""
        loop, a_step = self.trainer.fit_loop, self.trainer.accumulate_grad_batches
        passed = loop.epoch_loop.batch_progress.current.processed
        if passed < loop.max_batches:
            passed -= passed % a_step
        return float(self.trainer.current_epoch + passed / loop.max_batches if loop.max_batches else 0)

    def _time_passed(self) -> float:
        """As a share of the trainer's `max_time`; 0 without one."""
        timers = [callback for callback in self.trainer.callbacks if isinstance(callback, L.callbacks.Timer)]
        return max((timer.time_elapsed() / timer._duration for timer in timers if timer._duration), default=0.0)

    # All in the steps themselves, and nothing in hooks around them: whoever overrides a hook need not know of ours.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.model is not None
        if several():  # whose clocks differ, and with them the learning rates would
            self._clock = of_first(self._time_passed(), self.device)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if first:
            self._begun_at, self._means = self.progress(), Means()
            self.objective.begin_step(self.model, self.global_step, self.beside)
        whole = self._numbered(batch)
        found = self._losses(whole, self.seed)
        if first:
            self._begin_step(found, whole, batch_idx)
        self._rows_seen += len(whole["index"]) * self.trainer.world_size
        # Shares of the step's loss. Lightning divides by the batches of a step, and its strategies by the processes.
        total = found.share(self._counts) * self.trainer.accumulate_grad_batches * self.trainer.world_size
        if not torch.isfinite(total) and several():
            # Leaving alone, this process would let the others wait in the backward pass. A gradient that is not finite
            # either goes to all of them, and stops them together.
            self._lost, total = f"the loss is {total.item()}", total * math.nan
        elif not torch.isfinite(total):
            self._stop(f"the loss is {total.item()}")
        self.last_losses = found.detached()
        self._means.add(found)
        if not self.trainer.fit_loop._should_accumulate():
            self.log("tokens", float(self.tokens_seen))
            if self._logged_now or not several():
                self._log("train", self._means)
        return total

    def _begin_step(self, found: Losses, first: Batch, batch_idx: int) -> None:
        """Sum the counts of all batches of the step, and its tokens, over all processes."""
        assert self.model is not None
        batches, counts, number = [first], [found.counts], self._rows_seen
        for raw in rest_of_step(self.trainer, batch_idx):
            number += len(batches[-1]["index"]) * self.trainer.world_size
            batches.append(self._numbered(self._on_device(raw), number))
            counts.append(self.objective.counts(self.model, batches[-1], self.seed, self._begun_at, self.beside))
        tokens = [(batch["doc"] >= 0).sum() for batch in batches]
        each = [[c[name] for c in counts] for name in found.counts]
        sums = summed(torch.stack([torch.stack([wide(x) for x in values]).sum() for values in (*each, tokens)]))
        self._counts = dict(zip(found.counts, sums, strict=False))
        self.tokens_seen = self._tokens_learned + int(sums[-1])

    def _on_device(self, raw: Any) -> Any:
        """What Lightning makes of a loader's batch before a step sees it."""
        batch = self.trainer.precision_plugin.convert_input(raw)
        batch = self._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _numbered(self, batch: Any, first: int | None = None) -> Batch:
        """The batch with all that belongs to it. Processes take rows in turn, so that numbers, and with them the noise,
        do not depend on how many there are."""
        first = self._rows_seen if first is None else first
        return as_batch(batch, first + self.global_rank, self.trainer.world_size)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        if batch_idx == dataloader_idx == 0:
            self._held_out = {}
        whole = self._held_out_batch(batch, batch_idx)
        self._held_out.setdefault(dataloader_idx, Means()).add(self._losses(whole, self.seed + 1))

    def _held_out_batch(self, batch: Any, batch_idx: int) -> Batch:
        """Numbered from 0 each time, so that figures can be compared."""
        if batch_idx == 0:
            self._held_out_rows = 0
        whole = self._numbered(batch, self._held_out_rows)
        self._held_out_rows += len(whole["index"]) * self.trainer.world_size
        return whole

    def _end_evaluation(self, stage: str) -> None:
        for number, means in self._held_out.items():
            self._log(stage, means, f"/dataloader_idx_{number}" if len(self._held_out) > 1 else "")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """The losses of each row by itself, and its text where there is a tokenizer."""
        whole = self._held_out_batch(batch, batch_idx)
        rows = []
        for place, number in enumerate(whole["index"].tolist()):
            if number == NOBODY:
                continue
            row = slice(place, place + 1)
            one = Batch(
                input_ids=whole["input_ids"][row], target=whole["target"][row], doc=whole["doc"][row],
                index=whole["index"][row],
            )  # fmt: skip
            found = self._losses(one, self.seed + 1)
            figures = {"loss": found.total, "ar": found.ar, "diffusion": found.diffusion}
            told: dict[str, Any] = {name: float(value) for name, value in figures.items() if value is not None}
            if self.tokenizer is not None:
                ids = one["input_ids"][one["doc"] >= 0]
                told["text"] = decode(self.tokenizer, ids.tolist())
            rows.append({"row": number, "targets": int(one["target"].sum()), **told})
        return rows

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["tokens_seen"], checkpoint["rows_seen"] = self._tokens_learned, self._rows_learned
        checkpoint["model_config"] = _fields(self.model.config)
        if self.objective.keeps_model:  # the model is where it came from, unchanged
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith("model.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.objective.keeps_model:
            frozen = {k: v for k, v in self.state_dict().items() if k.startswith("model.")}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]
        self.check_shapes(checkpoint.get("state_dict", {}))  # sharded strategies load weights on their own
        self.tokens_seen = self._tokens_learned = checkpoint["tokens_seen"]
        self._rows_seen = self._rows_learned = checkpoint.get("rows_seen", 0)

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
        models = {name: weight for name, weight in weights.items() if name.startswith("model.")}
        _compare(models, {f"model.{name}": weight for name, weight in like.state_dict().items()})

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:  # fmt: skip
        """By the trainer's word, where it has one, else to `Optimizer.clip_norm`."""
        learned = [weight for weight in self.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in learned if weight.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # (With float16 a step may overflow: its scaler leaves that step out, and scales the next ones less.)
            self._stop(self._lost or f"the gradient's norm is {norm.item()}")
        limit = self.optimizer.clip_norm if gradient_clip_val is None else float(gradient_clip_val)
        if gradient_clip_algorithm == "value" and limit > 0:
            torch.nn.utils.clip_grad_value_(learned, limit)
        elif limit > 0:  # 0 is Lightning's word for none
            torch.nn.utils.clip_grads_with_norm_(learned, limit, norm)
        # A step that is not done when saving begins anew on resuming.
        self._tokens_learned, self._rows_learned = self.tokens_seen, self._rows_seen
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
        # Held-out figures are those of the settings that the job ends with, or they could not be compared.
        return self.objective.loss(self.model, batch, seed, self._begun_at if self.training else 1.0, self.beside)

    def _log(self, stage: str, means: Means, end: str = "") -> None:
        """Log a step's means, or those of an evaluation; all processes together."""
        bits = None if self.data is None else 1 / math.log(2) / self.data.bytes_per_token
        for name, value in self.objective.figures(means.taken(), bits).items():
            self.log(
                f"{stage}/{name}{end}", value, prog_bar=stage == "train" and name in ("ar", "diffusion"),
                add_dataloader_idx=False,
            )  # fmt: skip

    @property
    def _logged_now(self) -> bool:
        """Whether this step's figures will be seen: only then it is worth the time to ask the other processes."""
        return bool(self.trainer._logger_connector.should_update_logs)  # as in Lightning's own callbacks


def new_model(config: dict[str, Any], tokenizer: Any, seed: int) -> HybridForCausalLM:
    """A model with fresh weights, for a tokenizer or the vocabulary of `config`; the weights depend on `seed` alone.

    Raises:
        ValueError: the tokenizer has no mask token, or a field of `config` is unknown or out of range.
    """
    _checked(config)
    if tokenizer is None:
        if "vocab_size" not in config:
            raise ValueError(
                "config: there is no tokenizer to take the vocabulary from: give vocab_size, and mask_token_id for all "
                "but a left-to-right model; or a tokenizer."
            )
        fields = {}
    else:
        _check_mask_token(tokenizer)
        fields = {
            "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HybridForCausalLM(HybridConfig(**{**fields, **config}))


def _check_mask_token(tokenizer: Any) -> None:
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which diffusion needs: add one as its mask_token.")


def _fields(config: HybridConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name in HybridConfig.__annotations__}


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
