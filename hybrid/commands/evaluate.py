"""`hybrid eval`: likelihood of given text, and the frontier of quality against speed."""

import json
from pathlib import Path


def likelihood(
    text: list[str],
    model: str = "hybrid-stdlib",
    block_sizes: tuple[int, ...] = (1, 4, 8),
    samples: int = 4,
    orders: int = 0,
    length: int = 128,
    rows: int | None = None,
) -> None:
    """Score text files: exact left-to-right likelihood, and the bounds of the other decoding laws.

    Each decoding law has its own likelihood. Left to right it is exact; for blocks and for diffusion over everything
    it is a bound that lies above it, estimated by drawing masks, with a standard error.

    Args:
        text: files to score, or stdlib:validation or stdlib:test, the parts that the shipped model never saw.
        model: folder of a trained model, hub name or shipped model.
        block_sizes: windows for the block bound; 1 is exactly left to right.
        samples: mask draws a row; the error falls with their square root.
        orders: also show each bound tightened: the mean over this many orders of reveal, before the logarithm. Costs
            as many forwards as orders times masked slots of a window, for each of the samples.
        length: tokens a row: a token is scored with at most this much text before it.
        rows: score only this many rows, evenly spread (default: all).
    """
    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.commands.texts import texts
    from hybrid.evals.likelihood import score, tokenized
    from hybrid.evals.table import likelihood_table

    loaded, tokenizer = load(model), load_tokenizer(model)
    documents = texts(text, "text")
    begin = next((i for i in (loaded.config.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if begin is None:
        raise ValueError(f"model: {model} has neither a bos nor an eos token to begin a text with.")
    scored = tokenized(tokenizer, documents, length=length, begin=begin, rows=rows)
    found = score(loaded, scored, block_sizes=tuple(block_sizes), samples=samples, orders=orders)
    wide_console().print(likelihood_table({"title": model, "likelihood": [entry.record() for entry in found]}))


def frontier(
    prompts: Path,
    model: str = "hybrid-stdlib",
    out: Path = Path("runs/frontier"),
    max_new_tokens: int = 64,
    thresholds: tuple[float, ...] = (0.9, 0.7),
    block_sizes: tuple[int, ...] = (4, 8),
    batch_size: int = 32,
    repeats: int = 3,
) -> None:
    """Decode prompts in every mode and setting: a table, a picture and a page of quality against speed.

    Quality is the edit similarity of the output to the true continuation, of the very outputs that were timed.

    Args:
        prompts: a JSON Lines file, each line with "prompt" and "target" (the true continuation).
        model: folder of a trained model, hub name or shipped model.
        out: folder for report.html, frontier.png and results.json.
        max_new_tokens: how far each prompt is continued.
        thresholds: confidence thresholds for blocks and diffusion.
        block_sizes: windows for blocks and speculation.
        batch_size: prompts decoded at once.
        repeats: timings of each setting, of which the median counts.
    """
    from datetime import UTC, datetime

    from hybrid import __version__
    from hybrid.commands.acts import sweep
    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.frontier import Prompt, environment
    from hybrid.evals.frontier import frontier as measure
    from hybrid.evals.quality import edit_similarity
    from hybrid.evals.report import SCHEMA, write_report
    from hybrid.evals.table import frontier_table

    loaded, tokenizer, console = load(model), load_tokenizer(model), wide_console()
    begin = [] if loaded.config.bos_token_id is None else [loaded.config.bos_token_id]
    given = [
        Prompt(ids=begin + tokenizer.encode(line["prompt"]), text=line["prompt"], target=line["target"])
        for line in _lines(prompts)
    ]
    settings = sweep(*thresholds, blocks=tuple(block_sizes))
    if not loaded.config.is_hybrid:
        settings = settings[:1]
    elif loaded.config.clean_attention != "causal":
        settings = tuple(s for s in settings if not s.lossless)
    with console.status("decoding") as status:
        rows, samples = measure(
            loaded, tokenizer, given, settings, lambda prompt, output, target: edit_similarity(output, target),
            max_new_tokens=max_new_tokens, batch_size=batch_size, repeats=repeats,
            progress=lambda what: status.update(f"decoding, {what}"),
        )  # fmt: skip
    act = {
        "name": "frontier", "title": f"{model} on {prompts.name}", "rows": rows, "samples": samples, "likelihood": [],
        "quality": {"name": "edit similarity", "unit": "share", "higher_is_better": True,
                    "description": f"of {max_new_tokens} new tokens to the true continuation"},
        "model": {"path": model, "parameters": loaded.num_parameters(), "block_size": loaded.config.block_size},
    }  # fmt: skip
    document = {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "hybrid": __version__,
        "environment": environment(loaded), "acts": [act],
    }  # fmt: skip
    page = write_report(document, out)
    console.print(frontier_table(act))
    console.print(f"The page with everything: {page}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _lines(path: Path) -> list[dict[str, str]]:
    found = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {path}, line {number} is not JSON ({error.msg}).") from error
        fields = record if isinstance(record, dict) else {}
        missing = [key for key in ("prompt", "target") if not isinstance(fields.get(key), str)]
        if missing:
            raise ValueError(
                f"prompts: {path}, line {number} lacks {', '.join(missing)}; "
                'a line is {"prompt": "…", "target": "…"}.'
            )
        found.append(record)
    if not found:
        raise ValueError(f"prompts: {path} has no lines.")
    return found
