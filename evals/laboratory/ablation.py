"""The figures that models trained in different ways are compared by, all on the same held-out rows.

Shapes: N rows of T tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.evals.acts import frontier
from hybrid.evals.likelihood import Text, score
from hybrid.evals.measures import edit_similarity
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.law import Law
from hybrid.texts import decode

Figures = dict[str, float | None]

# What stands in the table, in its order: heading and figure.
COLUMNS = {
    "AR, bits a byte": "ar_bits_per_byte",
    "block bound": "block_bits_per_byte",
    "masked bound": "masked_bits_per_byte",
    "kept per round": "acceptance",
    "ar quality": "ar_quality",
    "ar exact": "ar_exact",
    "block quality": "block_quality",
    "block exact": "block_exact",
    "block tokens a forward": "block_tokens_per_forward",
    "block distinct-2": "block_distinct_2",
    "training, minutes": "minutes",
}


def whole_rows(ids: Tensor, target: Tensor, doc: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """At most `rows` of the rows that are of one document, evenly spread: ids and targets, which run from the first
    one to the row's end, never from its first token.

    Raises:
        ValueError: `rows` is below 1, or every row has several documents or padding.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1.")
    whole = ((doc == doc[:, :1]) & (doc >= 0)).all(1) & target[:, 1:].any(1)
    if not whole.any():
        raise ValueError("no held-out row is of one document; make rows shorter, or documents longer.")
    at = whole.nonzero()[:, 0]
    at = at[torch.linspace(0, len(at) - 1, min(rows, len(at))).long()]
    position = torch.arange(ids.shape[1]).expand(len(at), -1)
    first = target[at].long().argmax(1, keepdim=True).clamp(min=1)
    return ids[at].long(), position >= first


def figures(
    model: HybridForCausalLM, tokenizer: Any, ids: Tensor, target: Tensor, *,
    window: int = 8, threshold: float = 0.9, samples: int = 4, batch_size: int = 32,
) -> Figures:  # fmt: skip
    """Likelihoods of the targets, and how the second half of each row is decoded from the first (or from where its
    targets begin, if that is later): what is kept of a speculative window, and the speed and quality of blocks.

    Args:
        ids, target: `[N, T]`, as `whole_rows` gives them.
        window: of speculation and of blocks, and of the block bound; a block-causal model has its own.
        threshold: confidence from which a token of a block is shown.
        samples: mask draws a row, for the bounds.
    """
    law = Law.of(model.config)
    window = law.grid or window
    size = sum(len(decode(tokenizer, row[on].tolist()).encode()) for row, on in zip(ids, target, strict=True))
    bounds = score(model, Text(ids=ids, target=target, size=size), block_sizes=(window,), samples=samples)
    found: Figures = {}
    for entry in bounds:
        name = f"{entry.law}_bits_per_byte"
        found[name] = entry.bits_per_byte
        if entry.bound:
            found[f"{name}_error"] = entry.standard_error / math.log(2) / size
    split = max(int(target.long().argmax(1).max()), ids.shape[1] // 2)
    given = [row.tolist() for row in ids]
    prompts = [
        Prompt(ids=row[:split], text=decode(tokenizer, row[:split]), target=decode(tokenizer, row[split:], row[:split]))
        for row in given
    ]
    ways: dict[str, dict[str, Any]] = {
        "ar": {}, "block": {"block_size": window, "confidence_threshold": threshold},
        "speculative": {"block_size": window},
    }  # fmt: skip
    settings = [Setting(name=mode, mode=mode, options=ways[mode]) for mode in ways if mode in law.modes]
    rows, _ = frontier(
        model, tokenizer, prompts, settings, lambda prompt, output, wanted: edit_similarity(output, wanted),
        max_new_tokens=ids.shape[1] - split, batch_size=batch_size, repeats=1, eos_token_id=[],
    )  # fmt: skip
    for row in rows:
        for name in ("quality", "exact", "distinct_2", "tokens_per_forward"):
            found[f"{row.setting}_{name}"] = getattr(row, name)
        found[f"{row.setting}_quality_error"] = row.quality_standard_error
        found["acceptance"] = row.acceptance if row.acceptance is not None else found.get("acceptance")
    return found


def markdown(rows: Mapping[str, Figures]) -> str:
    """A table with a row for each name; ± is one standard error."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, found in rows.items():
        cells = (_cell(found.get(figure), found.get(f"{figure}_error")) for figure in COLUMNS.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
