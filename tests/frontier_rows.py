"""A tiny model on toy prompts, and what the frontier measures of it."""

from typing import Any

from oracles import texts, tiny

from hybrid import HybridForCausalLM
from hybrid.evals.acts import REFERENCE, frontier
from hybrid.evals.measures import edit_similarity
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.evals.results import SCHEMA, TIMINGS
from hybrid.evals.timing.machine import environment
from hybrid.training.text.tokenizing import character_tokenizer

ALPHABET = "abcdefghijklmnopqrst"
TOKENIZER = character_tokenizer(ALPHABET)  # 3 special tokens, of which 0 is the mask, and 20 letters
NEW = 9
REFERENCE_TOLD = f"ar: {REFERENCE}"
SETTINGS = (
    Setting(name="one at a time", mode="ar"),
    Setting(name="window 4", mode="speculative", options={"block_size": 4}),
    Setting(name="block 4", mode="block", options={"block_size": 4, "confidence_threshold": 0.3}),
    Setting(name="block 3, two steps", mode="block", options={"block_size": 3, "steps_per_block": 2}),
    Setting(name="all at once", mode="diffusion", options={"confidence_threshold": 0.3}),
)


def model_of(**fields: Any) -> HybridForCausalLM:
    given = {
        "vocab_size": len(TOKENIZER), "mask_token_id": TOKENIZER.mask_token_id, "bos_token_id": 1, "eos_token_id": 1,
        "pad_token_id": 2, "peaked": 1.0,
    }  # fmt: skip
    return tiny(3, **{**given, **fields})


def prompts(count: int = 6) -> list[Prompt]:
    """Of different lengths, so that batches are padded."""
    rows = texts(4, [3, 7, 1, 5, 12, 4, 2, 6, 9][:count], len(ALPHABET))
    found = []
    for row, target in zip(rows, texts(5, [NEW] * count, len(ALPHABET)), strict=True):
        text = "".join(ALPHABET[i] for i in row)
        found.append(
            Prompt(ids=[1, *TOKENIZER.encode(text)], text=text, target="".join(ALPHABET[i] for i in target))
        )
    return found


def score(prompt: str, output: str, target: str) -> float:
    return edit_similarity(output, target)


def measure(model: HybridForCausalLM, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and samples, as the file has them."""
    given = {"settings": SETTINGS, "repeats": 1, "max_new_tokens": NEW, **options}
    settings = given.pop("settings")
    found = frontier(model, TOKENIZER, given.pop("prompts", prompts()), settings, score, **given)
    rows, samples = ([part.plain() for part in parts] for parts in found)
    return rows, samples


def untimed(rows: list[dict[str, Any]], *also: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in (*TIMINGS, *also)} for row in rows]


def document(rows: list[dict[str, Any]], samples: list[dict[str, Any]], model: HybridForCausalLM) -> dict[str, Any]:
    act = {
        "name": "toy", "title": "A toy", "rows": rows, "samples": samples,
        "quality": {"name": "similarity", "unit": "share", "higher_is_better": True},
    }  # fmt: skip
    return {
        "schema": SCHEMA, "created": "2026-01-01T00:00:00+00:00", "hybrid": "0", "environment": environment(model),
        "acts": [act],
    }  # fmt: skip
