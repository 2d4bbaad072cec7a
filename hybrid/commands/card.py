"""`hybrid card`: the model card of a folder, with what was measured of it."""

from pathlib import Path


def card(
    model: str,
    results: Path | None = None,
    title: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write README.md of a model folder, as the hub reads it: how the model is used, and quality against speed.

    Every folder that is saved has a card already; this one has more in it, and goes along with `push_to_hub` for as
    long as the weights are the same. A card that somebody else wrote stays as it is.

    Example: `hybrid card runs/mine --results runs/mine/results.json`.

    Args:
        model: folder of the model.
        results: a results.json of `hybrid eval frontier` or of the quickstart, whose tables go in.
        title: the heading (default: the folder's name).
        license: an identifier that the hub knows, like apache-2.0.
        base_model: what the model was made of, as a hub name.
    """
    from hybrid import HybridConfig
    from hybrid.checkpoints.card import NAME, write_card
    from hybrid.checkpoints.tensorfile import CheckpointError, read_json

    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {model} is no folder of a model: it has no config.json.")
    if read_json(folder / "config.json").get("model_type") != HybridConfig.model_type:
        raise ValueError(f"model: {model} is of another format; `hybrid convert` makes a folder of ours of it.")
    tables = []
    if results is not None:
        from hybrid.evals.results import load_results
        from hybrid.evals.table import frontier_markdown

        tables = [frontier_markdown(act) for act in load_results(results).acts]
    given = {"title": title or folder.resolve().name, "license": license, "base_model": base_model, "tables": tables}
    try:
        config = HybridConfig.from_pretrained(folder)
    except OSError as error:
        raise CheckpointError(str(error)) from error
    if not write_card(folder, config, **given):
        raise ValueError(f"model: {folder / NAME} is somebody's own and stays; move it to have one written.")
    print(folder / NAME)
