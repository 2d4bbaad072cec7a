"""Variants of a recipe, each with one setting changed, to be trained alike and compared."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid.training.cli import HybridCLI
from hybrid.training.module import HybridTask
from hybrid.training.running.start import new_model

NOISE = "model.objective.noise"

# What a recipe says already is found out when they are read, and left out.
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "left to right only": {"model.objective.diffusion_weight": 0.0},
    "diffusion_weight 0.3": {"model.objective.diffusion_weight": 0.3},
    "diffusion_weight 1": {"model.objective.diffusion_weight": 1.0},
    "seeds noised too": {f"{NOISE}.seed_clean": False},
    "no first drafts": {f"{NOISE}.draft_prob": 0.0},
    "draft_prob 0.4": {f"{NOISE}.draft_prob": 0.4},
    "no canvases": {f"{NOISE}.canvas_prob": 0.0},
    "canvas_prob 0.2": {f"{NOISE}.canvas_prob": 0.2},
    "blocks on a grid": {f"{NOISE}.offset": "grid"},
    "blocks anywhere": {f"{NOISE}.offset": "random"},
    "slots predict the next": {"model.config.diffusion_prediction": "next"},
    "slots predict themselves": {"model.config.diffusion_prediction": "in_place"},
    "complementary masks": {f"{NOISE}.complementary": True},
    "pooled denominator": {"model.objective.denominator": "pooled"},
    "one time a sequence": {f"{NOISE}.t_per": "sequence"},
    "independent times": {f"{NOISE}.antithetic": False},
    "times 0.3 to 0.8": {f"{NOISE}.t_range": [0.3, 0.8]},
    "blocks of 2 to 16": {f"{NOISE}.block_sizes": [2, 4, 8, 16]},
    "blocks that grow and shrink": {
        f"{NOISE}.block_sizes": [], "model.objective.curriculum": {"warmup": [1, 2, 4], "stable": 16, "decay": [8]},
    },
    "left to right first": {"model.objective.ar_first": 0.5},
    "z_loss 1e-4": {"model.objective.z_loss": 1e-4},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model to train: a name, and the arguments of `hybrid train fit` that make it.

    `key` changes with the recipe's text and every argument, so that what was trained otherwise is not taken for it.
    """

    name: str
    arguments: tuple[str, ...]
    key: str

    def folder(self, out: Path) -> Path:
        return out / f"{self.name.replace(' ', '-')}-{self.key[:8]}"

    def train(self, out: Path) -> float | None:
        """Train it, or go on where it was interrupted, and leave the model in its folder; what is trained already is
        left alone. Returns the minutes that it took, None where an interruption hides them."""
        folder = self.folder(out)
        state, done = (folder.parent / f"{folder.name}.{end}" for end in ("ckpt", "done"))
        if not done.exists():
            resume = ["--ckpt_path", str(state)] if state.exists() else []
            began = time.monotonic()
            HybridCLI.run(["fit", *self.arguments, "--out", str(folder), *resume])
            done.write_text("" if resume else str((time.monotonic() - began) / 60))
        return float(done.read_text()) if done.read_text() else None


def variants(
    recipe: Path, changes: Mapping[str, Mapping[str, Any]], steps: int | None, seed: int
) -> tuple[list[Variant], HybridCLI]:
    """Those of `changes` that differ from one another, and the recipe read, with its data loaded. Nothing is trained.

    Args:
        changes: for each name, the options that differ from the recipe's, by their names on the command line.
        steps: of each; None is the recipe's own number.
        seed: of weights and noise.

    Raises:
        ValueError: a variant's settings do not go together; its name is in the message.
    """
    found: list[Variant] = []
    seen: list[Any] = []
    first: HybridCLI | None = None
    for name, options in changes.items():
        arguments = ["--config", str(recipe), f"--model.seed={seed}"]
        for option, value in options.items():
            arguments.append(f"--{option}={value if isinstance(value, str) else json.dumps(value)}")
        if steps is not None:
            arguments.append(f"--trainer.max_steps={steps}")
        read = HybridCLI.read(arguments)
        first = first or read
        first.datamodule.setup()
        task = read.model
        try:
            model = _checked(task, first)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        said = (task.objective, model, task.init_from, task.optimizer, repr(read.config["data"]))
        if said in seen:
            continue
        seen.append(said)
        key = hashlib.sha256(json.dumps([recipe.read_text(), arguments[2:]]).encode()).hexdigest()
        found.append(Variant(name=name, arguments=tuple(arguments), key=key))
    if first is None:
        raise ValueError("variants: there are none; name at least one.")
    return found, first


def _checked(task: HybridTask, recipe: HybridCLI) -> dict[str, Any] | None:
    """The settings of the model to be made, if they go with the objective; None for a checkpoint's, which are known
    when it is read."""
    if task.config is None:
        return None
    data = recipe.datamodule
    with torch.device("meta"):
        config = new_model(task.config, data.tokenizer, task.seed).config
    task.objective.check(config, data.length)
    return dict(config.to_dict())
