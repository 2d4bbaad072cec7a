"""The law of a model: the table in `hybrid/law.py` row by row, and that nobody else decides what it says."""

import ast
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Label, labels_of, places, table
from torch import Tensor

from hybrid import HybridConfig, Layout
from hybrid.law import Law

SIZE, MASK = 3, 7
KINDS = list(product(("causal", "block", "full"), ("in_place", "next")))
every_kind = pytest.mark.parametrize(("clean", "prediction"), KINDS)
every_start = pytest.mark.parametrize("start", [0, 1, 3, 7])


def law_of(clean: str, prediction: str, mask: int | None = MASK) -> Law:
    config = HybridConfig(
        vocab_size=8, hidden_size=8, num_attention_heads=2, block_size=SIZE, mask_token_id=mask, clean_attention=clean,
        diffusion_prediction=prediction,
    )  # fmt: skip
    return Law.of(config)


# --- Facts ------------------------------------------------------------------------------------------------


FACTS = ("exact", "cached", "follows", "seeds")
# Modes and likelihoods in their order, which of the facts are true, `unit` and `grid`; by the two fields and whether
# there is a mask token.
TABLE = {
    ("causal", "in_place", True): (
        "ar block diffusion speculative", "ar block masked", "exact cached follows seeds", 1, None
    ),
    ("causal", "next", True): (
        "ar block diffusion speculative", "ar block masked", "exact cached follows seeds", 1, None
    ),
    ("block", "in_place", True): ("block diffusion ar speculative", "block masked", "cached", SIZE, SIZE),
    ("block", "next", True): (
        "block diffusion ar speculative", "block masked", "cached follows seeds", SIZE, SIZE
    ),
    ("full", "in_place", True): ("block diffusion", "masked", "", 1, None),
    ("full", "next", True): ("block diffusion", "masked", "follows", 1, None),
    # Without a mask token there is nothing but left to right, which takes causal clean text.
    ("causal", "in_place", False): ("ar", "ar", "exact cached follows seeds", 1, None),
    ("causal", "next", False): ("ar", "ar", "exact cached follows seeds", 1, None),
    ("block", "in_place", False): ("", "", "cached", SIZE, SIZE),
    ("block", "next", False): ("", "", "cached follows seeds", SIZE, SIZE),
    ("full", "in_place", False): ("", "", "", 1, None),
    ("full", "next", False): ("", "", "follows", 1, None),
}  # fmt: skip


@every_kind
@pytest.mark.parametrize("masked", [True, False])
def test_the_table_row_by_row(clean: str, prediction: str, masked: bool) -> None:
    law = law_of(clean, prediction, MASK if masked else None)
    true = [name for name in FACTS if getattr(law, name)]
    said = (*map(" ".join, (law.modes, law.likelihoods, true)), law.unit, law.grid)
    assert said == TABLE[clean, prediction, masked]


@every_kind
@pytest.mark.parametrize("masked", [True, False])
def test_a_mode_is_refused_with_its_reason_or_is_there(clean: str, prediction: str, masked: bool) -> None:
    law = law_of(clean, prediction, MASK if masked else None)
    for mode in ("ar", "block", "diffusion", "speculative", "infill"):
        reason = law.refusal(mode)
        # Infilling is no mode of `generate`; whoever drafts can do it.
        assert (reason is None) == (masked if mode == "infill" else mode in law.modes)
        if reason is not None and (mode != "ar" and not masked):
            assert "mask_token_id is None" in reason and "hybrid convert" in reason
        elif reason is not None:
            assert "clean_attention='causal', or 'block'" in reason and f"this checkpoint has {clean!r}" in reason


@every_kind
def test_left_to_right_is_a_law_of_its_own_for_block_models(clean: str, prediction: str) -> None:
    law = law_of(clean, prediction)
    for mode in ("ar", "speculative"):
        own = law.of_mode(mode)
        if clean != "block":
            assert own == law
            continue
        assert own.seeds and own.unit == 1 and own.grid is None and own.probed == (prediction == "in_place")
        # Each clean token's question is asked in its sight and in nobody else's.
        layout, width = own.said(places(4)), 4
        assert [layout.position[0, slot].item() - 1 for slot in own.says(width)] in ([0, 1, 2, 3], [-1, 0, 1, 2])
        seen = table(labels_of(layout), labels_of(layout))
        for i, slot in enumerate(own.says(width)):
            assert [j for j in range(len(seen)) if seen[slot][j]] == sorted({*range(i + 1), slot})
    assert all(law.of_mode(mode) == law for mode in ("block", "diffusion", "infill"))


# --- Layouts ----------------------------------------------------------------------------------------------

# Whether token i of clean text sees token j of it.
CLEAN: dict[str, Callable[[int, int], bool]] = {
    "causal": lambda i, j: j <= i,
    "block": lambda i, j: j // SIZE <= i // SIZE,
    "full": lambda i, j: True,
}


def seen(*parts: Layout) -> list[list[bool]]:
    """Who sees whom, by the rule in words, of several layouts side by side."""
    labels: list[Label] = [label for part in parts for label in labels_of(part)]
    return table(labels, labels)


def matrix(names: Sequence[Any], sees: Callable[[Any, Any], bool]) -> list[list[bool]]:
    return [[sees(q, k) for k in names] for q in names]


@every_kind
@every_start
def test_clean_text(clean: str, prediction: str, start: int) -> None:
    law, tokens = law_of(clean, prediction), range(start, start + 8)
    assert seen(law.clean(places(8, start))) == matrix(tokens, CLEAN[clean])
    # Another grid, where training says so; it is nobody's but that of block-causal text.
    other = (lambda i, j: j // 4 <= i // 4) if clean == "block" else CLEAN[clean]
    assert seen(law.clean(places(8, start), 4)) == matrix(tokens, other)


@every_kind
@every_start
def test_a_window_sees_itself_and_all_text_before_it_and_nobody_sees_it(
    clean: str, prediction: str, start: int
) -> None:
    law = law_of(clean, prediction)
    begin = law.begin(start)
    assert begin == {"causal": start, "block": start // SIZE * SIZE, "full": 0}[clean]
    window = law.window(places(4, begin))
    if clean == "full":
        assert labels_of(window) == labels_of(law.clean(places(4)))  # the canvas is all that there is
        return
    text = [("text", i) for i in range(begin)]
    names = [*text, *(("window", i) for i in range(4))]
    parts = [law.clean(places(begin)), window] if begin else [window]
    assert seen(*parts) == matrix(
        names, lambda q, k: q[0] == "window" or (k[0] == "text" and CLEAN[clean](q[1], k[1]))
    )
    both = seen(law.window(places(4, begin), 1), law.window(places(4, begin), 2))
    assert both == matrix(range(8), lambda q, k: q // 4 == k // 4)


@every_kind
def test_noisy_views_of_whole_rows(clean: str, prediction: str) -> None:
    """In blocks of unequal size (on the grid, where there is one), in two packed documents and padding."""
    law = law_of(clean, prediction)
    starts = [0, 0, 0, 3, 3, 3, 6, 6, 6, 9] if clean == "block" else [0, 1, 1, 1, 4, 4, 6, 6, 6, 6]
    doc = [0, 0, 0, 0, 0, 1, 1, 1, -1, -1]
    real = torch.tensor([doc])
    given = (torch.tensor([starts]), real)

    def sees(q: tuple[int, int], k: tuple[int, int]) -> bool:
        (view, i), (other, j) = q, k
        if doc[i] != doc[j] or doc[j] < 0:
            return False
        if view == other == 0:
            return CLEAN[clean](i, j)
        if view == other:
            return clean == "full" or starts[i] == starts[j]
        # Of clean text, what is of blocks before: it must not tell a slot what stands there.
        return other == 0 and (j // SIZE * SIZE if clean == "block" else j) < starts[i]

    views = [law.noisy(*given), law.noisy(*given, stream=2)]
    if law.cached:
        views = [law.clean(places(10)).where(real >= 0, real), *views]
    first = 0 if law.cached else 1
    names = [(view, i) for view in range(first, 3) for i in range(10)]
    assert seen(*views) == matrix(names, sees)


@every_kind
@pytest.mark.parametrize("size", [None, 1, SIZE, 5])
def test_windows_over_given_text_begin_where_decoding_opens_them(
    clean: str, prediction: str, size: int | None
) -> None:
    law, length, firsts = law_of(clean, prediction), 11, (1, 2, 3, 6, 10)
    if clean == "block" and size not in (None, SIZE):
        return  # decoding refuses it: the grid says how long blocks are
    slow = []
    for first in firsts:
        row = list(range(length))  # given text: each is its own
        begin = law.begin(first) if clean == "block" else first
        while begin < length:
            end = min(begin + (size or length), length)
            row[begin:end] = [begin] * (end - begin)
            begin = end
        if clean == "block":  # and so is what is given, which lies on the grid as well
            row = [min(start, i // SIZE * SIZE) for i, start in enumerate(row)]
        slow.append(row)
    found = law.starts(places(length).expand(len(firsts), -1), torch.tensor(firsts)[:, None], size)
    assert found.tolist() == slow


# --- Predictions ------------------------------------------------------------------------------------------


def slow_reads(prediction: str, labels: Sequence[Label]) -> list[int]:
    """Which row answers each slot: its own, or that of the slot before it in its block and its document."""
    rows = []
    for slot, (position, block, _, doc) in enumerate(labels):
        begins = slot == 0 or position == block or labels[slot - 1][3] != doc
        rows.append(slot if prediction == "in_place" or begins else slot - 1)
    return rows


def read_layouts(law: Law) -> Iterator[Layout]:
    """Windows, a canvas, views in blocks that follow one another, of packed documents, and one that is cut short."""
    place = places(10)
    for start in (0, 6):
        yield law.window(places(4, start))
    for size in (1, 3, 5):
        yield Layout.blocks(place, size)
    views = law.noisy(place // 4 * 4, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1, -1]]))
    yield views
    yield Layout(views.labels[..., 2:])
    uneven = torch.cat([place // 4 * 4, (place + 1) // 3 * 3 - 1]).clamp(min=0)
    yield law.noisy(uneven, torch.zeros_like(uneven))


@every_kind
def test_the_rows_that_answer(clean: str, prediction: str) -> None:
    law = law_of(clean, prediction)
    for layout in read_layouts(law):
        rows, count = layout.labels.shape[1:]
        slow = torch.tensor([slow_reads(prediction, labels_of(layout, row)) for row in range(rows)])
        assert torch.equal(law.reads(layout).expand(rows, -1), slow)
        # The same without the gather; a layout of one row stands for any number of them.
        for shape in ((rows, count, 1), (max(rows, 2), count, 7), (rows, count)):
            hidden = torch.arange(float(torch.Size(shape).numel())).view(shape)
            index = slow.expand(shape[0], -1)
            wanted = torch.stack([row[mine] for row, mine in zip(hidden, index, strict=True)])
            assert torch.equal(law.predictions(hidden, layout), wanted)


def test_next_is_not_in_place() -> None:
    """Else the comparison above could pass by comparing nothing."""
    in_place, following = (law_of("causal", kind).reads(Layout.window(places(4))) for kind in ("in_place", "next"))
    assert in_place.tolist() == [[0, 1, 2, 3]] and following.tolist() == [[0, 0, 1, 2]]


@every_kind
def test_the_mask_is_never_an_answer(clean: str, prediction: str) -> None:
    logits: Tensor = torch.arange(16.0).view(2, 8)
    before = logits.clone()
    found = law_of(clean, prediction).without_mask(logits)
    assert found[:, MASK].tolist() == [-torch.inf] * 2 and torch.equal(found[:, :MASK], before[:, :MASK])
    assert torch.equal(logits, before)  # what `forward` gave is the caller's
    assert law_of(clean, prediction, None).without_mask(logits) is logits


# --- Nobody else decides it -------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
FOLDERS = ("hybrid", "sampling", "training", "evals")
NAMES = {"clean_attention", "diffusion_prediction"}
# What says what the two may be, what follows from them, and which format means what by them.
DECIDE = ("hybrid/config.py", "hybrid/law.py", "hybrid/formats/")


def named(node: ast.AST) -> bool:
    """Whether the value of one of the two stands in `node`, as a variable, a field or the key of a record."""
    return any(
        (isinstance(part, ast.Attribute) and part.attr in NAMES)
        or (isinstance(part, ast.Name) and part.id in NAMES)
        or (isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant) and part.slice.value in NAMES)
        for part in ast.walk(node)
    )


def decisions(source: str) -> Iterator[int]:
    """Lines where something is decided by one of the two: comparisons, matches, look-ups by its value, and its value
    under another name, by which it could be compared unseen."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            parts = list(node.args)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            parts = [value for value in values if isinstance(value, ast.Attribute | ast.Name | ast.Subscript)]
        if any(map(named, parts)):
            yield node.lineno  # type: ignore[attr-defined]


def test_only_the_law_compares_what_it_follows_from() -> None:
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    found = [
        f"{name}:{line}"
        for name, path in ((path.relative_to(ROOT).as_posix(), path) for path in files)
        if not name.startswith(DECIDE)
        for line in decisions(path.read_text())
    ]
    assert len(files) > 100
    assert found == []


@pytest.mark.parametrize("source", [
    "if config.clean_attention == 'causal': pass",
    "x = 1 if 'next' != self.config.diffusion_prediction else 2",
    "x = clean_attention in ('block', 'full')",
    "x = {'causal': 1}[config.clean_attention]",
    "x = {'causal': 1}.get(model.config.clean_attention)",
    "match config.clean_attention:\n    case 'full': pass",
    "self.clean, self.count = config.clean_attention, 3",
    "if (kind := config.diffusion_prediction): pass",
    "x = record['model']['clean_attention'] == 'causal'",
])  # fmt: skip
def test_a_planted_decision_is_found(source: str) -> None:
    assert len(set(decisions(source))) == 1


@pytest.mark.parametrize("source", [
    "record = {'clean_attention': config.clean_attention}",
    "convert(diffusion_prediction=diffusion_prediction or 'in_place')",
    "raise ValueError(f'clean_attention is {config.clean_attention!r}')",
    "x = Law.of(config).exact",
    "fields = {'a': 1, 'diffusion_prediction': given}",
])  # fmt: skip
def test_what_only_passes_the_names_on_is_not_found(source: str) -> None:
    assert list(decisions(source)) == []
