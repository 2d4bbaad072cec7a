"""Small files in the form in which the packages bring them."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.evals.benchmarks.packaged import PLACES


def write(root: Path, benchmark: str, lines: Sequence[dict[str, Any]]) -> None:
    """Put them where the package of the benchmark has them, `root` being on the path."""
    package, _, file = PLACES[benchmark]
    path = root / package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / package / "__init__.py").write_text("raise RuntimeError('the package itself is never imported')\n")
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def _request(number: int, context: str, continuation: str, **doc: Any) -> dict[str, Any]:
    return {
        "doc": doc, "request": {"context": context, "continuation": continuation}, "doc_id": number,
        "native_id": number, "label": None,
    }  # fmt: skip


def write_all(root: Path) -> None:
    write(root, "gsm8k", [
        _request(i, f"Q: 1+{i}?\nA:", f" {i} more. It is {i + 1}.", short_answer=str(i + 1)) for i in range(4)
    ])  # fmt: skip
    write(root, "lambada", [_request(i, f"word {i} of the", " day") for i in range(4)])
    write(root, "mbpp", [
        _request(i, f"Add {i}.\n```python\n", f"def f(x):\n    return x + {i}\n```", test_setup_code="",
                 test_list=[f"assert f(1) == {1 + i}", f"assert f(2) == {2 + i}"]) for i in range(3)
    ])  # fmt: skip
    write(root, "humaneval", [
        {"task_id": f"HumanEval/{i}", "prompt": f'def f(x):\n    """Add {i}."""\n', "entry_point": "f",
         "canonical_solution": f"    return x + {i}\n", "test": f"def check(g):\n    assert g(1) == {1 + i}\n"}
        for i in range(3)
    ])  # fmt: skip
    choices = [" sat.", " ran off.", " was blue.", " ate."]
    lines = [
        _request(i, f"The cat {i}", choice, choices=choices) | {"label": i % 4} for i in range(5) for choice in choices
    ]
    write(root, "hellaswag", lines + [line | {"doc_id": line["doc_id"] + 1_000_000} for line in lines])
