"""LightningCLI with this library's task, data and habits."""

import importlib.resources
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hybrid.training.callbacks import ProgressBar, SaveModel
from hybrid.training.data import HybridData
from hybrid.training.job import loggers, quiet, watchers
from hybrid.training.module import HybridTask
from hybrid.training.running.checkpoint import check_writable, read_checkpoint
from hybrid.training.running.precision import best_precision
from hybrid.training.watching.predictions import WritePredictions

SIZES = importlib.resources.files("hybrid.training") / "recipes" / "sizes"


class JobTrainer(L.Trainer):
    """Lightning's, which also takes `precision: auto`: what `best_precision` says of this machine.

    Args:
        precision: Lightning's, or "auto".
    """

    def __init__(self, *args: Any, precision: int | str | None = None, **kwargs: Any) -> None:
        chosen = best_precision() if precision == "auto" else precision
        super().__init__(*args, precision=chosen, **kwargs)
        if precision == "auto":
            _tell(f"precision: {chosen}, the faster one on this machine (auto)")


@rank_zero_only
def _tell(what: str) -> None:
    print(what, file=sys.stderr)


class SaveSettings(SaveConfigCallback):
    """Lightning's, which writes `config.yaml` beside the log; without one it would stand in the folder where one is,
    maybe in place of the very recipe."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.log_dir is not None and Path(trainer.log_dir).resolve() != Path.cwd():
            super().setup(trainer, pl_module, stage)


class HybridCLI(LightningCLI):
    """`--out` names the model folder, `--wandb offline|online` adds Weights & Biases beside the CSV log, and `--size`
    stands for all fields of a file of `recipes/sizes`."""

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
            HybridTask, HybridData, trainer_class=JobTrainer, subclass_mode_data=True, seed_everything_default=False,
            auto_configure_optimizers=False, args=with_sizes(arguments), run=run,
            trainer_defaults={
                "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
                "num_sanity_val_steps": 0, "log_every_n_steps": 10,
            },
            # Nothing but `fit` touches what a job has left.
            save_config_callback=SaveSettings if arguments[:1] == ["fit"] else None,
            save_config_kwargs={"overwrite": True},
        )  # fmt: skip

    def __init__(self, *given: Any, args: list[str], **more: Any) -> None:
        self._first = args[0] if args else ""
        super().__init__(*given, args=args, **more)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        # Behind the name of one, no option of another can be asked for, and each takes long to prepare.
        if self._first in self.subcommands() and subcommand != self._first:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the option to load checkpoints that run code."""
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        """Settings come from the recipe and the command line; Lightning would read them from the checkpoint."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        given = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "fit" and given.get("ckpt_path") is None:
            given["ckpt_path"] = self._trained(subcommand)
        if given.get("ckpt_path") is not None:
            self.model.check_resumable(read_checkpoint(given["ckpt_path"], mmap=True)["state_dict"])
        return {**given, "weights_only": True}  # sharded strategies read checkpoints on their own

    def _trained(self, subcommand: str) -> str | None:
        """The checkpoint that the recipe's job has left; None for the folder that `init_from` names, where there is no
        such job."""
        state_file, begun = Path(f"{self._chosen['out']}.ckpt"), self.model.init_from
        if state_file.exists():
            settings = read_checkpoint(state_file, mmap=True).get("hyper_parameters", {})
            if begun is None or settings.get("init_from", begun) == begun:
                print(f"{subcommand}: what was trained, {state_file}", file=sys.stderr)
                return str(state_file)
        if begun is None:
            raise ValueError(
                f"{subcommand}: there is no {state_file}, so no weights: train first, name a checkpoint with "
                "--ckpt_path, or a model folder with --model.config=null --model.init_from=FOLDER."
            )
        print(f"{subcommand}: {begun} as it is; {state_file} is not what was trained from it", file=sys.stderr)
        return None

    @property
    def _chosen(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

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
        chosen = self._chosen
        out = Path(chosen["out"])
        if self.subcommand == "fit":
            check_writable(out)  # before the log is begun there
        resumed, own_logs = chosen.get("ckpt_path"), chosen["trainer"]["logger"] in (None, True)
        if self.subcommand == "fit" and chosen["wandb"] and not own_logs:
            warnings.warn("wandb: the recipe's trainer.logger takes its place; leave one of them out.", stacklevel=2)
        elif self.subcommand == "fit" and chosen["wandb_artifact"] and not chosen["wandb"]:
            warnings.warn("wandb_artifact: no run keeps the model; set wandb to offline or online.", stacklevel=2)
        if own_logs and self.subcommand not in (None, "fit"):
            kwargs["logger"] = False  # a job's log is that of its training
        elif own_logs:
            settings = yaml.safe_load(self._parser(self.subcommand).dump(chosen))
            kwargs["logger"] = loggers(
                out.parent, out.name, chosen["wandb"], Path(resumed) if resumed else None, config=settings,
                artifact=chosen["wandb_artifact"],
            )  # fmt: skip
        saver = SaveModel(str(out), chosen["save_minutes"])
        init = self.config_init[self.subcommand] if self.subcommand else self.config_init
        callbacks = [*watchers(), *(init["trainer"].get("callbacks") or []), ProgressBar(out.name), saver]
        callbacks.append(WritePredictions(out.parent, out.name))
        # What others do in a step is saved with it; averages are put in place of the weights after all is saved.
        kwargs["callbacks"] = sorted(callbacks, key=lambda callback: isinstance(callback, WeightAveraging))
        return super().instantiate_trainer(**kwargs)


def with_sizes(arguments: list[str]) -> list[str]:
    """The same with `--size NAME` or `--size FILE.yaml` written out, so that what comes behind it still has its say.

    Raises:
        ValueError: there is no such size.
    """
    found, rest = [], iter(arguments)
    for word in rest:
        name, given, value = word.partition("=")
        if name != "--size":
            found.append(word)
            continue
        value = value if given else next(rest, "")
        file = Path(value) if value.endswith(".yaml") else SIZES / f"{value}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(entry.name.removesuffix(".yaml") for entry in SIZES.iterdir()))
            raise ValueError(f"--size is {value!r}; use one of {known}, or a YAML file with the fields to set.")
        found += [f"--{path}={json.dumps(field)}" for path, field in _leaves(yaml.safe_load(file.read_text()))]
    return found


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
