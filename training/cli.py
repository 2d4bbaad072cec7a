"""LightningCLI with this library's task, data and habits."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

from hybrid.training.callbacks import ProgressBar, SaveModel
from hybrid.training.data import HybridData
from hybrid.training.job import loggers, quiet, watchers
from hybrid.training.module import HybridTask


class HybridCLI(LightningCLI):
    """`--out` names the model folder, `--wandb offline|online` adds Weights & Biases beside the CSV log."""

    @classmethod
    def run(cls, arguments: list[str]) -> "HybridCLI":
        """Parse a command line and run it."""
        return cls._made(arguments, run=True)

    @classmethod
    def read(cls, arguments: list[str]) -> "HybridCLI":
        """The task (`model`) and the data (`datamodule`) that a recipe describes, nothing run and no log begun; no word
        for what to do stands before the options."""
        return cls._made([*arguments, "--trainer.logger=false"], run=False)

    @classmethod
    def _made(cls, arguments: list[str], run: bool) -> "HybridCLI":
        quiet()
        return cls(
            HybridTask, HybridData, subclass_mode_data=True, seed_everything_default=False, args=arguments, run=run,
            trainer_defaults={
                "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
                "num_sanity_val_steps": 0, "log_every_n_steps": 10,
            },
            save_config_kwargs={"overwrite": True},
        )  # fmt: skip

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the option to load checkpoints that run code."""
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        """Settings come from the recipe and the command line; Lightning would read them from the checkpoint."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Sharded strategies read checkpoints on their own.
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--out", type=str, default="runs/model", help="folder for the trained model")
        parser.add_argument(
            "--save_minutes", type=float, default=10.0, help="save the model and all that resuming needs this often"
        )
        parser.add_argument(
            "--wandb", type=str, choices=["offline", "online"],
            help="also log to Weights & Biases; offline needs no account",
        )  # fmt: skip
        parser.add_argument(
            "--wandb_artifact", type=bool, default=False, help="keep the trained model there, too, as an artifact"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        chosen = self.config[self.subcommand] if self.subcommand else self.config
        out = Path(chosen["out"])
        if chosen["trainer"]["logger"] in (None, True):
            settings = yaml.safe_load(self._parser(self.subcommand).dump(chosen))
            kwargs["logger"] = loggers(
                out.parent, out.name, chosen["wandb"], bool(chosen.get("ckpt_path")), config=settings,
                artifact=chosen["wandb_artifact"],
            )  # fmt: skip
        saver = SaveModel(str(out), chosen["save_minutes"])
        init = self.config_init[self.subcommand] if self.subcommand else self.config_init
        callbacks = init["trainer"].get("callbacks") or []
        # What others do in a step is saved with it.
        kwargs["callbacks"] = [*watchers(), *callbacks, ProgressBar(out.name), saver]
        return super().instantiate_trainer(**kwargs)
