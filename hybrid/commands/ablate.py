"""`hybrid train ablate`: what each setting of the objective is worth."""

import json
from pathlib import Path
from typing import Any


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
    import yaml

    from hybrid import HybridForCausalLM
    from hybrid.common.files import write_whole
    from hybrid.evals.laboratory.ablation import figures, markdown, whole_rows
    from hybrid.training.laboratory.ablation import VARIANTS
    from hybrid.training.laboratory.ablation import variants as made

    if config is None or not config.is_file():
        raise ValueError(f"config: {'name a recipe' if config is None else f'there is no file {config}'}; --config.")
    changes = VARIANTS
    if variants is not None:
        changes = yaml.safe_load(variants.read_text(encoding="utf-8"))
        if not isinstance(changes, dict) or not all(isinstance(options, dict) for options in changes.values()):
            raise ValueError(f"variants: {variants} is not of the form {{name: {{option: value}}}}.")
    names = [name.strip() for name in only.split(",") if name.strip()] or list(changes)
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
