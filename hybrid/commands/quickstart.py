"""`hybrid quickstart`: train, decode in four modes, evaluate and report, with nothing downloaded."""

import csv
import inspect
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from hybrid import HybridForCausalLM
from hybrid.commands.acts import ACTS, SHIPPED, Trial, shipped
from hybrid.commands.console import wide_console
from hybrid.commands.models import load, load_tokenizer
from hybrid.evals.acts import act_of
from hybrid.evals.document import Act, Training
from hybrid.evals.likelihood import score
from hybrid.evals.report import write_report
from hybrid.evals.results import document_of
from hybrid.evals.table import in_a_sentence, shown
from hybrid.training.job import fit


def quickstart(
    only: Literal["text", "puzzles"] | None = None,
    minutes: float | None = None,
    out: Path = Path("runs/quickstart"),
    reuse: bool = False,
    wandb: Literal["offline", "online"] | None = None,
    seed: int = 0,
) -> None:
    """Train two small hybrid models on this machine and show quality against speed in all four modes.

    Two short acts, under ten minutes together on two cores, and nothing is downloaded. "text" learns the source of
    Python's standard library, and is shown beside the model that comes with the package; "puzzles" learns 4x4 sudoku,
    where quality is exact. Each trains one checkpoint, decodes held-out prompts left to right, in blocks, by full
    diffusion and speculatively, and ends with a table.
    At the end, open OUT/report.html in a browser.

    Example: `hybrid quickstart --only puzzles --minutes 3`.

    Args:
        only: run one act alone.
        minutes: training time of each act (default: 1.5 for text, 4.5 for puzzles); 1 is enough to see it work.
        out: folder for the report, the pictures, results.json and the trained models.
        reuse: keep models that an earlier run finished, and go on with one that was interrupted.
        wandb: also log training to Weights & Biases; "offline" needs neither account nor network.
        seed: of the weights, the data order and all noise.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes is {minutes}; training needs some time: a number above 0.")

    console = wide_console()
    acts, model = [], None
    for name in [only] if only else list(ACTS):
        console.rule(f"[bold]{name}")
        try:
            record, model = _play(name, minutes, out, reuse, wandb, seed, console)
        except (KeyboardInterrupt, SystemExit):
            given = {"only": only, "minutes": minutes, "out": out, "wandb": wandb, "seed": seed}
            asked = {k: v for k, v in given.items() if v != inspect.signature(quickstart).parameters[k].default}
            again = " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in asked.items())
            print("\nInterrupted.")
            if (out / name).exists():
                print(f"What was trained is in {out / name} and loads as it is.")
            print(f"To go on from there: hybrid quickstart --reuse {again}".rstrip())
            sys.exit(130)
        acts.append(record)
        if name == "text":
            acts.append(_shipped(console))
        document = document_of(model, acts)
        page = write_report(document, out)
    console.rule("[bold]in short")
    for line in filter(None, map(in_a_sentence, acts)):
        console.print(line)
    place = (acts[-1].model or {})["path"]
    console.print(
        f"\nThe page with everything: {page}\n"
        f"The picture: {out / 'frontier.png'}   The numbers: {out / 'results.json'}\n"
        f"To go on in Python: HybridForCausalLM.from_pretrained('{place}')"
    )


def _play(
    name: str, minutes: float | None, out: Path, reuse: bool, wandb: Any, seed: int, console: Console
) -> "tuple[Act, Any]":
    """Train and judge one act: it, and the model."""
    act = ACTS[name](seed)
    folder = out / name
    with console.status("preparing the data"):
        act.data.setup()
    if hasattr(act.data, "corpus"):
        console.print(act.data.corpus.summary())
    marker = folder.parent / f"{name}.json"
    if reuse and folder.exists() and marker.exists():
        console.print(f"Reusing the model in {folder}.")
        training = json.loads(marker.read_text())
    else:
        marker.unlink(missing_ok=True)
        length = minutes or act.minutes
        console.print(f"Training for {length:g} minutes.")
        trainer = fit(act.task, act.data, folder, minutes=length, title=name, wandb=wandb, resume=reuse)
        training = {
            "minutes": length,
            "steps": trainer.global_step,
            "tokens": act.task.tokens_seen,
            "precision": str(trainer.precision),
            "seed": seed,
            "curves": _curves(out / "logs" / name / "metrics.csv"),
        }
        marker.write_text(json.dumps(training))
    model = HybridForCausalLM.from_pretrained(folder).eval()
    return _judged(act.trial(), model, str(folder), training, console), model


def _shipped(console: Console) -> Act:
    """The act of the model that comes with the package, on the places that the text act asks for."""
    console.rule(f"[bold]{SHIPPED}")
    return _judged(shipped(load_tokenizer(SHIPPED)), load(SHIPPED), SHIPPED, None, console)


def _judged(trial: Trial, model: Any, place: str, training: Any, console: Console) -> Act:
    """Decode and score."""
    with console.status("likelihoods"):
        likelihood = score(model, trial.text, block_sizes=trial.block_sizes)
    about = {
        "training": None if training is None else Training(**training), "notes": list(trial.notes),
        "likelihood": [entry.record() for entry in likelihood],
    }  # fmt: skip
    with console.status("decoding") as status:
        act = act_of(
            model, trial.tokenizer, trial.prompts, trial.settings, trial.measure, name=trial.name, title=trial.title,
            place=place, source=trial.name, max_new_tokens=trial.max_new_tokens, repeats=2, latency_batch_sizes=(1,),
            progress=lambda what: status.update(f"decoding, {what}"), options=trial.options, about=about,
        )  # fmt: skip
    assert act is not None  # one process has the results
    console.print(*shown(act), sep="\n")
    return act


def _curves(path: Path) -> dict[str, list[float | None]]:
    """The two losses against the step, from the CSV log."""
    names = {"step": "step", "ar_loss": "train/ar", "diffusion_loss": "train/diffusion"}
    with path.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("train/loss")]
    return {ours: [float(row[theirs]) if row.get(theirs) else None for row in rows] for ours, theirs in names.items()}
