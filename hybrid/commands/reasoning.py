"""Tasks whose answers can be checked: their prompts, scores and settings, and `hybrid eval reasoning`.

A task is the data section of a recipe, so that what is asked is what that recipe held out of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.evals.frontier import Prompt, Score, Setting
    from hybrid.training.data import HybridData

# By name, the packaged recipe that trains for it.
TASKS = {"sudoku4": "sudoku.yaml", "sudoku6": "sudoku6.yaml", "countdown": "countdown.yaml"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Held-out prompts and how answers are judged.

    Attributes:
        title: for headings.
        quality: name, unit, description and direction of the score, as in the results document.
        prompts: begin token and question of each.
        score: (prompt, output, target) -> quality in [0, 1]; anything may be in the output.
        max_new_tokens: how long an answer is.
        options: for every `generate`.
    """

    title: str
    quality: dict[str, Any]
    prompts: list["Prompt"]
    score: "Score"
    max_new_tokens: int
    options: dict[str, Any]


def find_task(name: str, tokenizer: Any, count: int = 256) -> Task:
    """`count` held-out prompts of a task.

    Args:
        name: one of `TASKS`, or a recipe: also the config.yaml that a training job leaves beside its logs.
        tokenizer: the model's.

    Raises:
        ValueError: no such task, its recipe's data has no checkable answers, or the tokenizer does not know them.
    """
    from hybrid.evals.frontier import Prompt
    from hybrid.training.data import SudokuData
    from hybrid.training.questions import CountdownData, ReasoningData, prompt

    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1.")
    data = data_of(name)
    options: dict[str, Any] = {}
    pairs: list[tuple[str, str]]
    score: Score
    if isinstance(data, SudokuData):
        sudoku = data.sudoku
        pairs = [(p[: sudoku.prompt_length], p[sudoku.prompt_length :]) for p in data.test(count)]
        score, length = (lambda given, output, target: float(sudoku.solved(given + output))), sudoku.cells
        title, said = f"{sudoku.side}x{sudoku.side} sudoku", "puzzles of which every cell is right"
        options = {"eos_token_id": []}
    elif isinstance(data, CountdownData):
        from hybrid.training.countdown import solved

        pairs, length = data.test(count), data.answer_length
        score = lambda given, output, target: float(solved(given + output))  # noqa: E731
        title, said = "countdown", "expressions that use each number once and make the target"
    elif isinstance(data, ReasoningData):
        entries = {prompt(entry): entry for entry in data.test(count)}
        pairs, length = [(question, str(entry["answer"])) for question, entry in entries.items()], data.answer_tokens()
        score = lambda given, output, target: data.gym.score(output, entries[given])  # noqa: E731
        title, said = f"{data.gym.name} (reasoning-gym)", "mean score of the data set's own scorer"
    else:
        raise ValueError(f"task: {name} trains on {type(data).__name__}, which has no answers that can be checked.")
    begin = tokenizer.bos_token_id
    prompts = [Prompt(ids=[begin, *_encoded(tokenizer, p, name)], text=p, target=answer) for p, answer in pairs]
    quality = {"name": "solved", "unit": "share", "higher_is_better": True, "description": said}
    return Task(
        title=f"{title}, held out of training", quality=quality, prompts=prompts, score=score, max_new_tokens=length,
        options=options,
    )  # fmt: skip


def data_of(name: str) -> "HybridData":
    """The data of a task, or of a recipe. Nothing is made or read yet.

    Raises:
        ValueError: there is no such task or file, or its data section is none.
    """
    import yaml

    from hybrid.training.data import HybridData

    if name in TASKS:
        text = (files("hybrid.training") / "recipes" / TASKS[name]).read_text(encoding="utf-8")
    elif Path(name).suffix in (".yaml", ".yml"):
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"task: there is no {name!r}; use {', '.join(TASKS)}, or the path of a recipe (.yaml).")
    try:
        recipe = yaml.safe_load(text)
        section = recipe["data"]
        module, _, kind = section["class_path"].rpartition(".")
        found = getattr(import_module(module), kind)
        if not (isinstance(found, type) and issubclass(found, HybridData)):
            raise ValueError(f"task: {name}: {section['class_path']} is no HybridData.")
        arguments = section.get("init_args") or {}
        make: Any = found  # its arguments are its own
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"task: {name} has no usable data section ({type(error).__name__}: {error}).") from error


def _encoded(tokenizer: Any, text: str, name: str) -> list[int]:
    from hybrid.training.tokenizers import encode_document

    try:
        found = encode_document(tokenizer, text)
    except Exception as error:  # what a character tokenizer raises for a character it does not have
        raise ValueError(f"model: its tokenizer cannot encode {name}'s prompts: it was not made for them.") from error
    if tokenizer.bos_token_id is None or tokenizer.decode(found) != text:
        raise ValueError(f"model: its tokenizer does not give {name}'s prompts back: it was not made for them.")
    return found


def orders(thresholds: Sequence[float], blocks: Sequence[int]) -> tuple["Setting", ...]:
    """One checkpoint, several orders: what each row shows beyond the one above it.

    Left to right by the causal model; left to right by the denoiser, which sees the whole answer; in random order; the
    most certain first, one token a forward; then several a forward, everywhere and in blocks; and speculation.
    """
    from hybrid.evals.frontier import Setting

    found = [
        Setting(name="left to right", mode="ar"),
        Setting(name="drafts, left to right", mode="diffusion", options={"reveal": "leftmost"}),
        Setting(name="drafts, random order", mode="diffusion", options={"reveal": "random"}),
        Setting(name="drafts, surest first", mode="diffusion", options={"reveal": "steps"}),
    ]
    for tau in thresholds:
        found.append(Setting(name=f"threshold {tau:g}", mode="diffusion", options={"confidence_threshold": tau}))
    for size in blocks:
        for tau in thresholds:
            options = {"block_size": size, "confidence_threshold": tau}
            found.append(Setting(name=f"block {size}, threshold {tau:g}", mode="block", options=options))
        found.append(Setting(name=f"window {size}", mode="speculative", options={"block_size": size}))
    return tuple(found)


def reasoning(
    model: str,
    task: str,
    count: int = 256,
    thresholds: tuple[float, ...] = (0.99, 0.9),
    block_sizes: tuple[int, ...] = (6,),
    batch_size: int = 32,
    repeats: int = 1,
    out: Path | None = None,
) -> None:
    """Let a model solve held-out puzzles in several orders: what any-order decoding buys over left to right.

    Each row of the table is a way to decode the same puzzles with the same weights; answers are checked, never compared
    with one solution. A sudoku cell that is hard from the left may be plain once others are filled in.

    Args:
        model: folder of a trained model, or a hub name.
        task: sudoku4, sudoku6, countdown, or a recipe: for other data, the config.yaml that training left in its logs.
        count: held-out puzzles.
        thresholds: how sure the model must be to show several tokens at once.
        block_sizes: windows for blocks and speculation.
        batch_size: puzzles decoded at once.
        repeats: timings of each setting, of which the median counts.
        out: also write report.html, a picture and results.json to this folder.
    """
    from transformers import AutoTokenizer

    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load
    from hybrid.evals.frontier import environment, frontier
    from hybrid.evals.table import frontier_table

    loaded, tokenizer, console = load(model), AutoTokenizer.from_pretrained(model), wide_console()
    found = find_task(task, tokenizer, count)
    settings = orders(thresholds, block_sizes)
    if not loaded.config.is_hybrid:
        settings = settings[:1]
    elif loaded.config.clean_attention != "causal":
        settings = tuple(s for s in settings if not s.lossless)
    with console.status("decoding") as status:
        rows, samples = frontier(
            loaded, tokenizer, found.prompts, settings, found.score, max_new_tokens=found.max_new_tokens,
            batch_size=batch_size, repeats=repeats, progress=lambda what: status.update(f"decoding, {what}"),
            **found.options,
        )  # fmt: skip
    act = {
        "name": "reasoning", "title": f"{model}: {found.title}", "rows": rows, "samples": samples, "likelihood": [],
        "quality": found.quality,
        "model": {"path": model, "parameters": loaded.num_parameters(), "block_size": loaded.config.block_size},
    }  # fmt: skip
    console.print(frontier_table(act))
    if out is not None:
        from datetime import UTC, datetime

        from hybrid import __version__
        from hybrid.evals.report import SCHEMA, write_report

        document = {
            "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "hybrid": __version__,
            "environment": environment(loaded), "acts": [act],
        }  # fmt: skip
        console.print(f"The page with everything: {write_report(document, out)}")
