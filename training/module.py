"""The Lightning job: one model, one objective, one optimizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.adapters.lora import LoRA
from hybrid.checkpoints.folder import load_tokenizer
from hybrid.checkpoints.place import place as shipped_place
from hybrid.formats import read
from hybrid.training.batch import check_context
from hybrid.training.component import Component
from hybrid.training.objective import Objective
from hybrid.training.optimizer import Optimizer
from hybrid.training.running.checkpoint import read_checkpoint
from hybrid.training.running.settings import plain, revived
from hybrid.training.running.sharding import Sharded, check_strategy, shard, whole_weights
from hybrid.training.running.start import check_fields, check_mask_token, compare, fields_of, new_model, other_word
from hybrid.training.step import Steps


class HybridTask(Steps):
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
        super().__init__()  # which begins all that a step keeps
        if (config is None) == (init_from is None):
            raise ValueError("config or init_from: give one of them, the settings of a new model or a checkpoint.")
        check_fields(config or {})
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
    def tokenizer(self) -> Any:
        """This task's, or the data's; None if neither has one, or the data have still to make it."""
        return super().tokenizer if self._tokenizer is None else self._tokenizer

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
            self._check_tokenizer(config)
        else:
            config = HybridConfig(**{"mask_token_id": 0, **(self.config or {})})
            if self.tokenizer is not None:
                check_mask_token(self.tokenizer)
        length = config.max_position_embeddings if data is None else data.length_asked
        if length is not None:
            self._check_length(config, length)
        return []

    def _check_tokenizer(self, config: HybridConfig) -> None:
        """Raise ValueError unless the job's text has the ids that the checkpoint `init_from` knows."""
        if self.tokenizer is None:
            return
        if config.vocab_size < len(self.tokenizer):
            raise ValueError(
                f"init_from: {self.init_from} knows {config.vocab_size} tokens, and the data's tokenizer "
                f"makes {len(self.tokenizer)}: pass the checkpoint's own tokenizer to the data."
            )
        place = Path(shipped_place(str(self.init_from)))
        if (place / "tokenizer.json").exists() and (word := other_word(self.tokenizer, load_tokenizer(place))):
            raise ValueError(
                f"init_from: {self.init_from} has a tokenizer that gives {word!r} another id than the data's, so the "
                "model would not know its own words: pass the checkpoint's own tokenizer to the data."
            )

    def _check_length(self, config: HybridConfig, length: int) -> None:
        check_context(length, config)
        self.objective.check(config, length)

    def configure_model(self) -> None:
        if self.model is None:
            self._make()
        self.objective.prepare(self.tokenizer, self.beside)

    def _make(self) -> None:
        texts = super().tokenizer
        if self._tokenizer is not None and texts is not None and (word := other_word(texts, self._tokenizer)):
            raise ValueError(
                f"tokenizer: it gives {word!r} another id than the data's own tokenizer, so the model would be saved "
                "with one that it was not trained on: leave it out, or give it to the data."
            )
        if self.init_from is not None:
            model = self._start()
            self._check_tokenizer(model.config)
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["tokens_seen"], checkpoint["rows_seen"] = self._tokens_learned, self._rows_learned
        checkpoint["model_config"] = fields_of(self.model.config)
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
        compare(weights, self.state_dict())

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
        compare(models, {f"model.{name}": weight for name, weight in like.state_dict().items()})

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

