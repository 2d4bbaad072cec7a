"""Results in Weights & Biases: tables, pictures and the files as an artifact."""

from pathlib import Path
from typing import Any, Literal

from hybrid.evals.document import Act, Results
from hybrid.evals.results import check_results
from hybrid.evals.table import csv_rows, marked_rows, speed_key

FILES = ("results.json", "frontier.csv", "frontier.png", "frontier.svg", "report.html")


def log_results(
    document: Results | dict[str, Any], folder: Path, mode: Literal["offline", "online"], *, project: str = "hybrid"
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
    document = check_results(document, "the results document")
    try:
        with wandb.init(
            project=project, job_type="eval", dir=str(folder), mode=mode, reinit="finish_previous",
            config={"environment": document.environment, "hybrid": document.hybrid, "schema": document.schema_},
            settings=wandb.Settings(silent=True),
        ) as run:  # fmt: skip
            logged: dict[str, Any] = {"frontier": wandb.Image(str(folder / "frontier.png"))}
            for act in document.acts:
                lines = csv_rows([act])
                data = [[_value(cell) for cell in line.values()] for line in lines]
                logged[f"{act.id}/rows"] = wandb.Table(columns=list(lines[0]) if lines else [], data=data)
                if act.samples:
                    columns = ["prompt", "target", *(f"{row.mode}: {row.setting}" for row in act.rows)]
                    data = [
                        [s.prompt, s.target, *(s.outputs.get(row.setting) for row in act.rows)] for s in act.samples
                    ]
                    logged[f"{act.id}/samples"] = wandb.Table(columns=columns, data=data)
                run.summary.update(_summary(act))
            logged["report"] = wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)
            run.log(logged)
            artifact = wandb.Artifact("frontier", type="evaluation", metadata={"schema": document.schema_})
            for file in FILES:
                artifact.add_file(str(folder / file))
            run.log_artifact(artifact)
    except wandb.Error as error:
        raise ValueError(f"wandb: {error}. The results are in {folder} all the same.") from error


def _value(cell: Any) -> Any:
    # wandb's columns have one type: numbers are of one kind, and a truth value is a word.
    return str(cell) if isinstance(cell, bool) else float(cell) if isinstance(cell, int) else cell


def _summary(act: Act) -> dict[str, Any]:
    found: dict[str, Any] = {} if act.aup is None else {f"{act.id}/aup": act.aup}
    if best := [row for row in marked_rows(act) if row.efficient]:
        fastest = max(best, key=lambda row: getattr(row, speed_key(act)))
        found |= {
            f"{act.id}/fastest/setting": f"{fastest.mode}: {fastest.setting}",
            f"{act.id}/fastest/quality": fastest.quality,
            f"{act.id}/fastest/tokens_per_forward": fastest.tokens_per_forward,
            f"{act.id}/fastest/speedup": fastest.speedup,
        }
    return found
