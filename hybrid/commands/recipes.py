"""`hybrid train clip` and `hybrid train ablate`: what the settings of a recipe are worth, tried out."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from hybrid import HybridForCausalLM
from hybrid.commands.console import Bar, table, wide_console
from hybrid.commands.models import load
from hybrid.commands.options import On, check_counts, listed
from hybrid.common.files import write_whole
from hybrid.evals.laboratory.ablation import figures, markdown, whole_rows
from hybrid.training.batch import Batch
from hybrid.training.cli import HybridCLI
from hybrid.training.laboratory.ablation import VARIANTS
from hybrid.training.laboratory.ablation import variants as made
from hybrid.training.laboratory.clip import candidates, search
from hybrid.training.objective import Objective


def clip(
    config: Path | None = None,
    model: str | None = None,
    batches: int = 20,
    draws: int = 4,
    widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9),
    stride: float = 0.05,
    seed: int = 0,
) -> None:
    """Search the range of times in which the loss of a trained model varies least (BD3-LM).

    Less variance is a steadier gradient. Each range is tried on the recipe's held-out rows, with the same random
    numbers; the setting to paste into the recipe is printed. Search with a model that has been trained for a while.

    Example: `hybrid train clip --config training/recipes/stdlib-bd3.yaml`.

    Args:
        config: the recipe (YAML) with the data and the objective.
        model: folder of the trained model, or a hub name (default: the recipe's `out`).
        batches: of held-out rows, at most.
        draws: how often each is corrupted; the error falls with their square root.
        widths: of the ranges to try.
        stride: between their beginnings.
        seed: of the noise.
    """
    if config is None:
        raise ValueError("config: name the recipe that the model was trained with, --config RECIPE.")
    check_counts(batches=batches, draws=draws)
    ranges = candidates(widths, stride)
    recipe = HybridCLI.read(["--config", str(config)])
    if not isinstance(recipe.model.objective, Objective):
        raise ValueError(f"config: {config} learns {type(recipe.model.objective).__name__}, which draws no times.")
    loaded = load(model or recipe.config["out"], On(device="cuda" if torch.cuda.is_available() else "cpu"))
    noise, data = recipe.model.objective.at(1.0).noise, recipe.datamodule
    data.setup()
    if len(data.tokenizer) > loaded.config.vocab_size:
        raise ValueError(
            f"model: it knows {loaded.config.vocab_size} tokens, and the recipe's tokenizer makes {len(data.tokenizer)}"
            "; give the model that was trained with this recipe."
        )
    held_out = [
        Batch(**{name: value.to(loaded.device) for name, value in batch.items()})  # type: ignore[typeddict-item]
        for batch in itertools.islice(data.val_dataloader(), batches)
    ]
    found = []
    with Bar() as bar:
        task = bar.begin("trying ranges", len(ranges))
        for t_range in ranges:
            found += search(loaded, held_out, noise, [t_range], draws=draws, seed=seed)
            bar.tell(task, len(found))
    found.sort(key=lambda c: c.variance)
    whole = next(c for c in found if c.t_range == (0.0, 1.0))
    shown = table(
        f"loss of a block, {len(held_out)} batches, {draws} draws each; the least variance first",
        "times", "variance", "standard error", "of the whole range's", "mean, nats a token",
    )  # fmt: skip
    for c in found:
        times = f"{c.t_range[0]:.3f} to {c.t_range[1]:.3f}"
        share = f"{c.variance / whole.variance:.1%}" if whole.variance else "–"
        shown.add_row(times, f"{c.variance:.4f}", f"{c.standard_error:.4f}", share, f"{c.mean:.3f}")
    wide_console().print(shown)
    low, high = found[0].t_range
    print(f"model:\n  objective:\n    noise:\n      t_range: [{low}, {high}]")


def ablate(
    config: Path | None = None,
    out: Path = Path("runs/ablation"),
    steps: int | None = None,
    only: str = "",
    variants: Path | None = None,
    rows: int = 64,
    window: int = 8,
    threshold: float = 0.9,
    samples: int = 4,
    seed: int = 0,
) -> None:
    """Train variants of a recipe for equally many steps, and compare them in one table.

    Each variant changes one setting of the recipe; variants that change nothing are left out. Likelihoods, what is
    kept of a speculative window, and speed and quality of decoding in blocks are measured on the same held-out rows.
    What is finished is kept in results.json, and an interrupted variant goes on where it was: run the same again.

    Example: `hybrid train ablate --config training/recipes/stdlib.yaml --steps 200`.

    Args:
        config: the recipe (YAML).
        out: folder for the models, results.json and table.md.
        steps: of each variant (default: the recipe's).
        only: names of the variants to run, separated by commas (default: all).
        variants: YAML file with your own variants instead, {name: {option: value}}, options as in `train fit`.
        rows: held-out rows to measure on, at most.
        window: of speculation, blocks and the block bound.
        threshold: confidence from which a token of a block is shown.
        samples: mask draws a row for the bounds.
        seed: of weights and noise.
    """
    if config is None or not config.is_file():
        raise ValueError(f"config: {'name a recipe' if config is None else f'there is no file {config}'}; --config.")
    check_counts(steps=steps, rows=rows, window=window)
    if samples < 2 or not 0 <= threshold <= 1:  # which is used when the first variant has been trained
        raise ValueError(f"samples is {samples}, threshold {threshold}; take 2 samples at least, and a share.")
    changes = VARIANTS if variants is None else _variants(variants)
    names = listed(only) or list(changes)
    if unknown := [name for name in names if name not in changes]:
        raise ValueError(f"only: there is no variant {', '.join(unknown)}; there are: {', '.join(changes)}.")
    todo, recipe = made(config, {name: changes[name] for name in names}, steps, seed)
    held_out = recipe.datamodule.validation_rows
    batch = held_out.__getitems__(list(range(len(held_out))))
    ids, target = whole_rows(batch["input_ids"], batch["target"], batch["doc"], rows)

    measure: dict[str, Any] = {"window": window, "threshold": threshold, "samples": samples}
    results = out / "results.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    shown = {}
    for number, variant in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {variant.name}", flush=True)
        key = f"{variant.key} {json.dumps({'rows': rows, **measure})}"
        if key not in kept:
            minutes = variant.train(out)
            model = HybridForCausalLM.from_pretrained(variant.folder(out)).eval()
            found = figures(model, recipe.datamodule.tokenizer, ids, target, **measure)
            kept[key] = {"name": variant.name, "minutes": minutes, **found}
            write_whole(results, json.dumps(kept, indent=1).encode())  # an hour of training hangs on it
        shown[variant.name] = kept[key]
        write_whole(out / "table.md", (markdown(shown) + "\n").encode())
    print((out / "table.md").read_text())


def _variants(path: Path) -> dict[str, dict[str, Any]]:
    try:
        changes = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"variants: {path} is not YAML ({error}).".replace("\n", " ")) from error
    if not isinstance(changes, dict) or not all(isinstance(options, dict) for options in changes.values()):
        raise ValueError(f"variants: {path} is not of the form {{name: {{option: value}}}}.")
    return changes
