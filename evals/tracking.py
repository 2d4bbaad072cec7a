"""Results in Weights & Biases: tables, pictures and the files as an artifact."""

import csv
import io
from pathlib import Path
from typing import Any, Literal

from hybrid.evals.results import Record, results_csv, slug
from hybrid.evals.table import efficient, speed_key

FILES = ("results.json", "frontier.csv", "frontier.png", "frontier.svg", "report.html")


def log_results(
    document: Record, folder: Path, mode: Literal["offline", "online"], *, project: str = "hybrid"
) -> None:
    """One run: a table of the rows and one of the samples for each act, the picture, the page, an artifact with the
    files that `write_report` left in `folder`, and in its summary each act's AUP and its best and fastest quality.

    Raises:
        ValueError: wandb is not installed, or the run could not be written; the files in `folder` are as they were.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb, or leave --wandb out.") from error
    try:
        with wandb.init(
            project=project, job_type="eval", dir=str(folder), mode=mode, reinit="finish_previous",
            config={"environment": document["environment"], "hybrid": document["hybrid"], "schema": document["schema"]},
            settings=wandb.Settings(silent=True),
        ) as run:  # fmt: skip
            logged: dict[str, Any] = {"frontier": wandb.Image(str(folder / "frontier.png"))}
            for act in document["acts"]:
                name = slug(act["name"])
                (header, *lines) = _lines(document, act)
                logged[f"{name}/rows"] = wandb.Table(columns=header, data=lines)
                samples = act.get("samples") or []
                if samples:
                    settings = [row["setting"] for row in act["rows"]]
                    data = [
                        [s["prompt"], s.get("target"), *(s["outputs"].get(setting) for setting in settings)]
                        for s in samples
                    ]
                    columns = ["prompt", "target", *(f"{row['mode']}: {row['setting']}" for row in act["rows"])]
                    logged[f"{name}/samples"] = wandb.Table(columns=columns, data=data)
                run.summary.update(_summary(act, name))
            logged["report"] = wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)
            run.log(logged)
            artifact = wandb.Artifact("frontier", type="evaluation", metadata={"schema": document["schema"]})
            for file in FILES:
                artifact.add_file(str(folder / file))
            run.log_artifact(artifact)
    except wandb.Error as error:
        raise ValueError(f"wandb: {error}. The results are in {folder} all the same.") from error


def _lines(document: Record, act: Record) -> list[list[Any]]:
    """The act's part of the CSV, with numbers as numbers."""
    rows = list(csv.reader(io.StringIO(results_csv({**document, "acts": [act]}))))
    return [rows[0], *([_value(cell) for cell in row] for row in rows[1:])]


def _value(cell: str) -> Any:
    # wandb's columns have one type: what is missing is None, and a truth value stays a word.
    if cell == "":
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def _summary(act: Record, name: str) -> Record:
    best = [act["rows"][i] for i in sorted(efficient(act))]
    found: Record = {} if act.get("aup") is None else {f"{name}/aup": act["aup"]}
    if best:
        fastest = max(best, key=lambda row: row[speed_key(act)])
        found |= {
            f"{name}/fastest/setting": f"{fastest['mode']}: {fastest['setting']}",
            f"{name}/fastest/quality": fastest["quality"],
            f"{name}/fastest/tokens_per_forward": fastest["tokens_per_forward"],
            f"{name}/fastest/speedup": fastest.get("speedup"),
        }
    return found
