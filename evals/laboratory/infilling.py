"""Filling gaps in code that the model has not seen: is it what stood there, does it parse, is it alike.

A gap is cut out of a Python function, whose other parts stay on both sides of it. The model is told how many tokens it
has, those of the text that stood there, and both sides are tokens of their own: a token that reaches over the border
is cut in two, in every mode alike.
"""

import ast
import hashlib
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybrid import HybridForCausalLM
from hybrid.common.checks import require
from hybrid.evals.measures import distinct, edit_similarity, exact_match, figure, parses
from hybrid.law import Law
from hybrid.sampling import Request, decode_all
from hybrid.texts import decode, encode, encode_behind

Kind = Literal["expression", "line", "body"]
KINDS = ("expression", "line", "body")
Row = tuple[list[int], int, list[int]]  # what stands before a gap, its tokens, what stands behind it
SIMPLE = (ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Raise, ast.Assert, ast.Delete)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A function with a piece cut out.

    Attributes:
        name: where it is from.
        before, truth, after: source that is the function when joined.
    """

    name: str
    before: str
    truth: str
    after: str


def gaps(source: str, name: str, kind: Kind) -> Iterator[Gap]:
    """One gap in each function of a Python file that has such a piece, the piece being picked by a hash of its name.

    Args:
        kind: "expression", what is returned or assigned; "line", a statement of one line; "body", all behind the
            docstring.

    Raises:
        ValueError: no such kind, or the source is no Python.
    """
    require(kind in KINDS, f"kind is {kind!r}; use one of {', '.join(KINDS)}.")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not Python that can be read ({error}).") from error
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        try:
            function = ast.parse(text).body[0]
        except SyntaxError:  # a string over several lines that begins further to the left
            continue
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        found = list(_pieces(function, kind))
        title = f"{name}:{node.name}:{node.lineno}"
        if found:
            key = hashlib.sha256(title.encode()).digest()
            begin, end = found[int.from_bytes(key[:4], "big") % len(found)]
            code = text.encode()
            at = [_offset(code, *place) for place in (begin, end)]
            before, truth, after = (part.decode() for part in (code[: at[0]], code[at[0] : at[1]], code[at[1] :]))
            yield Gap(name=title, before=before, truth=truth, after=after)


def fill(
    model: HybridForCausalLM, tokenizer: Any, given: Sequence[Gap], *, max_gap: int = 32, limit: int | None = None,
    batch_size: int = 16, progress: Callable[[int, int], None] = lambda done, total: None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fill gaps and compare with what stood there; beside it, what greedy `ar` writes behind the left side alone.

    Args:
        max_gap: tokens of a gap at most; longer ones, and functions that do not fit the context, are left out.
        limit: only the first so many that are left.
        progress: told how many are done, of how many.
        options: of `infill`.

    Returns:
        "gaps" (how many) and "left_out"; "exact_match", "edit_similarity", "parses" (the whole function), each a mean
        with its standard error; "tokens_per_forward", "distinct_2"; the same figures of "left_to_right" where the
        model can; "answers", each filled text.

    Raises:
        ValueError: nothing is left to fill, or an option is not one of `infill`.
    """
    require("mode" not in options, "mode: gaps are filled in none of `generate`'s; leave it out.")
    require(max_gap >= 1, f"max_gap is {max_gap}; a gap has at least one token.")
    require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1.")
    chosen, rows = _fitting(model, tokenizer, given, max_gap, limit)
    ways = _ways(model, rows, options)
    figures: dict[str, dict[str, Any]] = {}
    done = itertools.count(1)
    for way, (requests, how) in ways.items():
        found, ledger = decode_all(
            model, requests, slots=batch_size, on_done=lambda _: progress(next(done), len(ways) * len(rows)),
            **{"do_sample": False} | how,
        )  # fmt: skip
        begins = [len(left) if way == "infill" else 0 for left, _, _ in rows]  # of what is new in the tokens
        tokens = [x.tokens[at : at + n] for x, at, (_, n, _) in zip(found, begins, rows, strict=True)]
        texts = [decode(tokenizer, t, after=left) for t, (left, _, _) in zip(tokens, rows, strict=True)]
        figures[way] = _figures(chosen, texts) | {
            "tokens_per_forward": ledger.tokens_per_forward,
            "distinct_2": figure([share for share in map(distinct, tokens) if share is not None])["value"],
            "answers": [{"name": g.name, "truth": g.truth, "text": t} for g, t in zip(chosen, texts, strict=True)],
        }
    result = figures.pop("infill") | figures
    return {"gaps": len(rows), "left_out": len(given) - len(rows) if limit is None else None, **result}


def _fitting(
    model: HybridForCausalLM, tokenizer: Any, given: Sequence[Gap], max_gap: int, limit: int | None
) -> tuple[list[Gap], list[Row]]:
    """The gaps that are short enough, in functions that are, and their tokens."""
    chosen, rows = [], []
    for gap in given:
        left = encode(tokenizer, gap.before, "the source")
        middle, right = (encode_behind(tokenizer, text, "the source") for text in (gap.truth, gap.after))
        whole = len(left) + len(middle) + len(right)
        if left and 1 <= len(middle) <= max_gap and whole <= model.config.max_position_embeddings:
            rows.append((left, len(middle), right))
            chosen.append(gap)
        if len(rows) == limit:
            break
    require(
        bool(rows),
        f"there is nothing to fill: of {len(given)} gaps none has at most {max_gap} tokens in a function that fits the "
        f"context of {model.config.max_position_embeddings}; take other sources, or a larger max_gap.",
    )
    return chosen, rows


def _ways(
    model: HybridForCausalLM, rows: Sequence[Row], options: dict[str, Any]
) -> dict[str, tuple[list[Request], dict[str, Any]]]:
    """What is asked of the model, both sides seen and the left one, and the options of that."""
    mask = model.config.mask_token_id
    if mask is None:
        raise ValueError("model: a pure AR model (mask_token_id is None) fills no gaps; see `hybrid convert`.")
    filled = [Request([*left, *[mask] * count, *right]) for left, count, right in rows]
    ways = {"infill": (filled, options | {"mode": "infill"})}
    if Law.of(model.config).exact:
        continued = [Request(left, max_new_tokens=count) for left, count, _ in rows]
        ways["left_to_right"] = continued, {"mode": "ar", "eos_token_id": []}
    return ways


def _figures(given: Sequence[Gap], texts: Sequence[str]) -> dict[str, Any]:
    pairs = list(zip(given, texts, strict=True))
    values = {
        "exact_match": [exact_match(text, gap.truth) for gap, text in pairs],
        "edit_similarity": [edit_similarity(text, gap.truth) for gap, text in pairs],
        "parses": [float(parses(gap.before + text + gap.after)) for gap, text in pairs],
    }
    return {name: figure(each) | {"values": each} for name, each in values.items()}


def _pieces(
    function: ast.FunctionDef | ast.AsyncFunctionDef, kind: Kind
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Begin and end, each line (from 1) and byte, of what may be cut out."""
    body = function.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    body = body[1:] if documented else body
    if kind == "body":
        if body:
            yield _span(body[0], body[-1])
        return
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if kind == "expression" and isinstance(node, ast.Return | ast.Assign | ast.AugAssign) and node.value:
            yield _span(node.value, node.value)
        if kind == "line" and isinstance(node, SIMPLE) and node.lineno == node.end_lineno:
            yield _span(node, node)


def _span(first: Any, last: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (first.lineno, first.col_offset), (last.end_lineno, last.end_col_offset)


def _offset(code: bytes, line: int, column: int) -> int:
    return sum(map(len, code.splitlines(keepends=True)[: line - 1])) + column
