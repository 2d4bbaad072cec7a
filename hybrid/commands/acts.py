"""The two acts of `hybrid quickstart`: what is trained, on what, and how it is judged."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from hybrid.evals.likelihood import Text, tokenized
from hybrid.evals.measures import Measure, edit_similarity, scored
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.evals.sweep import expand
from hybrid.texts import encode_document
from hybrid.training.cli import HybridCLI
from hybrid.training.data import HybridData, SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.tasks.stdlib import Corpus, Document, load_stdlib

SHIPPED = "hybrid-stdlib"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a model is judged. `options` go to every `generate`."""

    name: str
    title: str
    measure: Measure
    tokenizer: Any
    prompts: list[Prompt]
    text: Text
    settings: tuple[Setting, ...]
    max_new_tokens: int
    block_sizes: tuple[int, ...]
    options: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Act:
    """What is trained, for how long, and how it is judged, which is known when the data are loaded."""

    minutes: float
    data: HybridData
    task: HybridTask
    trial: Callable[[], Trial]


def sweep(*thresholds: float, blocks: tuple[int, ...]) -> tuple[Setting, ...]:
    """The settings of a frontier: left to right, speculation, blocks and all at once."""
    sizes, taus = list(blocks), list(thresholds)
    return sweep_of(
        {"mode": "ar"},
        {"mode": "speculative", "block_size": sizes, "fused": [None, True]},
        {"mode": "block", "block_size": sizes, "confidence_threshold": taus},
        {"mode": "diffusion", "confidence_threshold": taus},
    )


def sweep_of(*entries: dict[str, Any]) -> tuple[Setting, ...]:
    return tuple(setting for entry in entries for setting in expand(entry))


def recipe(name: str, seed: int) -> HybridCLI:
    """What is trained, from `training/recipes/quickstart-NAME.yaml`: `hybrid train fit` runs the same."""
    file = files("hybrid.training") / "recipes" / f"quickstart-{name}.yaml"
    return HybridCLI.read([f"--config={file}", f"--model.seed={seed}", f"--data.init_args.seed={seed}"])


def act(name: str, seed: int, trial: Callable[[Any], Trial]) -> Act:
    """An act of the recipe's; `trial` is asked with its data once they are loaded."""
    read = recipe(name, seed)
    days, hours, minutes, seconds = map(int, read.config["trainer"]["max_time"].split(":"))
    long = 60 * (24 * days + hours) + minutes + seconds / 60
    return Act(minutes=long, data=read.datamodule, task=read.model, trial=lambda: trial(read.datamodule))


def puzzles(seed: int) -> Act:
    """4x4 sudoku: short, exact, and easier in any order than from left to right."""

    def trial(data: SudokuData) -> Trial:
        begin, given, rows = data.tokenizer.bos_token_id, data.sudoku.prompt_length, data.validation_rows
        return Trial(
            name="puzzles",
            title="4x4 sudoku, grids never seen in training",
            measure=scored(
                lambda prompt, output, target: float(data.sudoku.solved(prompt + output)), "solved",
                "share of held-out puzzles whose 16 cells are all right", targets=False,
            ),
            tokenizer=data.tokenizer,
            prompts=[
                Prompt(ids=[begin, *data.tokenizer.encode(p[:given])], text=p[:given], target=p[given:])
                for p in data.held_out[:256]
            ],
            text=Text(ids=rows.ids.long(), target=rows.target, size=int(rows.target.sum())),  # a byte a token
            settings=sweep(0.999, 0.99, 0.9, blocks=(4, 8)),
            max_new_tokens=data.sudoku.cells,
            block_sizes=(1, 4, 8),
            options={"eos_token_id": []},
            notes=("Puzzles show 7 to 11 of 16 cells and have one solution; whole grids are held out of training.",),
        )  # fmt: skip

    return act("puzzles", seed, trial)


def text(seed: int) -> Act:
    """Python source: what a few minutes on two cores teach about real text, which is little."""
    return act("text", seed, lambda data: text_trial(
        "text", "Python's standard library, files never seen in training", data.tokenizer, data.corpus,
        sweep(0.6, 0.3, blocks=(4, 8)), (1, 4, 8),
        "A million parameters and a few minutes on a laptop: expect the look of Python, not its sense.",
    ))  # fmt: skip


def shipped(tokenizer: Any) -> Trial:
    """The model that comes with the package, at the same places of the same held-out files."""
    return text_trial(
        SHIPPED, f"{SHIPPED}, at the same places", tokenizer, load_stdlib(),
        sweep_of(
            {"mode": "ar"}, {"mode": "speculative", "block_size": [None, 8]},
            {"mode": "block", "block_size": 8, "confidence_threshold": 0.6},
        ), (1, 8),
        "Six million parameters and longer training; its tokens are longer than those of the model above, so compare "
        "bits per byte.",
    )  # fmt: skip


def text_trial(
    name: str, title: str, tokenizer: Any, corpus: Corpus, settings: tuple[Setting, ...], block_sizes: tuple[int, ...],
    note: str,
) -> Trial:  # fmt: skip
    """Held-out files of the standard library, continued and scored."""
    given, asked, count, rows = 64, 48, 48, 60
    found = [p for d in corpus.test for p in excerpts(d, tokenizer, given, asked, 3)]
    return Trial(
        name=name,
        title=title,
        measure=scored(
            lambda prompt, output, target: edit_similarity(output, target), "edit similarity",
            f"of {asked} new tokens to the true continuation: 1 - edit distance / length",
        ),
        tokenizer=tokenizer,
        prompts=found[:count],
        text=tokenized(
            tokenizer, [d.text for d in corpus.test], length=128, begin=tokenizer.bos_token_id, rows=rows
        ),
        settings=settings,
        max_new_tokens=asked,
        block_sizes=block_sizes,
        options={},
        notes=(note,),
    )  # fmt: skip


def excerpts(document: Document, tokenizer: Any, given: int, asked: int, count: int) -> list[Prompt]:
    """Prompts that end at a line's end, at places that a hash of the file's name picks, and what follows there."""
    lines = document.text.splitlines(keepends=True)
    found = []
    for number in range(count):
        key = hashlib.sha256(f"{document.name}:{number}".encode()).digest()
        at = int.from_bytes(key[:4], "big") % max(1, len(lines))
        follows = lines[at] if at < len(lines) else ""
        indent = follows[: len(follows) - len(follows.lstrip(" "))]
        before = encode_document(tokenizer, "".join(lines[:at]) + indent)[-given:]
        after = encode_document(tokenizer, "".join(lines[at : at + asked])[len(indent) :])[:asked]
        if len(before) == given and len(after) == asked:
            found.append(Prompt(ids=before, text=tokenizer.decode(before), target=tokenizer.decode(after)))
    return found


ACTS: dict[str, Callable[[int], Act]] = {"text": text, "puzzles": puzzles}
