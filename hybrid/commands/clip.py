"""`hybrid train clip`: the range of noise that makes the loss vary least."""

from pathlib import Path


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
    import itertools

    import torch
    from rich.table import Table

    from hybrid.commands.console import Bar, wide_console
    from hybrid.commands.generate import load
    from hybrid.training.batch import Batch
    from hybrid.training.cli import HybridCLI
    from hybrid.training.laboratory.clip import candidates, search
    from hybrid.training.objective import Objective

    if config is None:
        raise ValueError("config: name the recipe that the model was trained with, --config RECIPE.")
    if batches < 1:
        raise ValueError(f"batches is {batches}; it must be at least 1.")
    ranges = candidates(widths, stride)
    recipe = HybridCLI.read(["--config", str(config)])
    if not isinstance(recipe.model.objective, Objective):
        raise ValueError(f"config: {config} learns {type(recipe.model.objective).__name__}, which draws no times.")
    loaded = load(model or recipe.config["out"])
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
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
    console = wide_console()
    found = []
    with Bar() as bar:
        task = bar.begin("trying ranges", len(ranges))
        for t_range in ranges:
            found += search(loaded, held_out, noise, [t_range], draws=draws, seed=seed)
            bar.tell(task, len(found))
    found.sort(key=lambda c: c.variance)
    whole = next(c for c in found if c.t_range == (0.0, 1.0))
    table = Table(title=f"loss of a block, {len(held_out)} batches, {draws} draws each; the least variance first")
    for heading in ("times", "variance", "standard error", "of the whole range's", "mean, nats a token"):
        table.add_column(heading, justify="left" if heading == "times" else "right")
    for c in found:
        times = f"{c.t_range[0]:.3f} to {c.t_range[1]:.3f}"
        share = f"{c.variance / whole.variance:.1%}" if whole.variance else "–"
        table.add_row(times, f"{c.variance:.4f}", f"{c.standard_error:.4f}", share, f"{c.mean:.3f}")
    console.print(table)
    low, high = found[0].t_range
    print(f"model:\n  objective:\n    noise:\n      t_range: [{low}, {high}]")
