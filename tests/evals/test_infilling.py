"""Gaps are cut where they should be, and what fills them is compared with what stood there."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny

from hybrid import HybridForCausalLM
from hybrid.evals.laboratory.infilling import KINDS, Gap, fill, gaps
from hybrid.evals.measures import figure
from hybrid.training.text.tokenizing import train_bpe

TOKENIZER = train_bpe(["x" * 9], 259)  # a token for every byte
SOURCE = '''
import os

def first(a, b):
    """Ünïcode."""
    é = "ß" + a; total = é
    if b:
        return (total +
                b)
    return total

class Thing:
    @property
    def second(self):
        return self.x[1]

    async def third(self):
        pass

    def fourth(self): "only words"

def fifth(n):
    text = """
stands to the left"""
    assert n, text
'''


def test_gaps_by_hand() -> None:
    found = {kind: {gap.name.split(":")[1]: gap for gap in gaps(SOURCE, "x.py", kind)} for kind in KINDS}
    assert list(found["body"]) == ["first", "fifth", "second", "third"]
    assert found["body"]["first"].truth.startswith('é = "ß"') and found["body"]["first"].truth.endswith("return total")
    assert found["body"]["second"] == Gap(
        name="x.py:second:14", before="def second(self):\n    ", truth="return self.x[1]", after="\n"
    )
    assert found["line"]["second"].truth == "return self.x[1]"
    assert found["expression"]["second"].truth == "self.x[1]"
    assert found["line"]["first"].truth in ('é = "ß" + a', "total = é", "return total")
    assert found["line"]["fifth"].truth == "assert n, text"
    assert found["expression"]["first"].truth in ('"ß" + a', "é", "total +\n            b", "total")
    assert set(found["expression"]) == set(found["line"]) == {"first", "fifth", "second"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_is_a_piece_of_a_function_that_parses(kind: Any) -> None:
    source = Path(ast.__file__).read_text(encoding="utf-8")
    found = list(gaps(source, "ast.py", kind))
    assert len(found) > 50 and len({gap.name for gap in found}) == len(found)
    assert found == list(gaps(source, "ast.py", kind))
    for gap in found:
        assert gap.truth.strip() == gap.truth and gap.truth
        ast.parse(gap.before + gap.truth + gap.after)
        if kind == "expression":
            ast.parse(f"({gap.truth})", mode="eval")
        if kind == "line":
            assert "\n" not in gap.truth


def test_what_is_no_python_is_said() -> None:
    with pytest.raises(ValueError, match=r"y\.py is not Python"):
        list(gaps("def f(:", "y.py", "line"))
    with pytest.raises(ValueError, match="kind is 'word'"):
        list(gaps("", "y.py", "word"))  # type: ignore[arg-type]


# --- Filling ------------------------------------------------------------------------------------------------


def model_that_writes(alphabet: str, **fields: Any) -> HybridForCausalLM:
    given = {"vocab_size": len(TOKENIZER), "mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model = tiny(2, initializer_range=0.4, **given, **fields)
    kept = set(TOKENIZER.encode(alphabet))
    model.generation_config.suppress_tokens = [i for i in range(len(TOKENIZER)) if i not in kept]
    return model


GAPS = [Gap(name=str(n), before=f"x{n} = ", truth="1" * n, after=" + a" * n + "\n") for n in (1, 4, 2, 7)]


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
def test_what_is_filled_is_what_infill_says(clean: str) -> None:
    model = model_that_writes("abc", clean_attention=clean)
    found = fill(model, TOKENIZER, GAPS, confidence_threshold=0.3, batch_size=3)
    for gap, answer in zip(GAPS, found["answers"], strict=True):
        left, right = [1, *TOKENIZER.encode(gap.before)], TOKENIZER.encode(gap.after)
        ids = torch.tensor([[*left, *[0] * len(gap.truth), *right]])
        out = model.infill(ids, confidence_threshold=0.3)[0, len(left) : len(left) + len(gap.truth)]  # type: ignore[index]
        assert answer == {"name": gap.name, "truth": gap.truth, "text": TOKENIZER.decode(out)}
        assert set(answer["text"]) <= set("abc") and len(answer["text"]) == len(gap.truth)
    assert found["exact_match"]["value"] == 0 and found["edit_similarity"]["value"] == 0
    assert found["parses"]["value"] == 1  # names plus names
    # The same gaps with what is written there as the truth, for all but one.
    true = [replace(gap, truth=answer["text"]) for gap, answer in zip(GAPS, found["answers"], strict=True)]
    told = fill(model, TOKENIZER, [*true[:3], GAPS[3]], confidence_threshold=0.3, batch_size=1)
    assert told["exact_match"] == figure([1, 1, 1, 0]) | {"values": [1, 1, 1, 0]}
    assert told["edit_similarity"]["value"] == 0.75
    assert told["gaps"] == 4 and told["left_out"] == 0
    assert ("left_to_right" in told) == (clean == "causal")
    if clean == "causal":
        baseline = told["left_to_right"]
        assert baseline["tokens_per_forward"] == 1
        for gap, answer in zip(GAPS, baseline["answers"], strict=True):
            ids = torch.tensor([[1, *TOKENIZER.encode(gap.before)]])
            new = model.generate(ids, max_new_tokens=len(gap.truth), eos_token_id=[])[0, ids.shape[1] :]  # type: ignore[index]
            assert answer["text"] == TOKENIZER.decode(new)


def test_text_that_does_not_parse_is_counted() -> None:
    model = model_that_writes("(")
    found = fill(model, TOKENIZER, GAPS)
    assert found["parses"]["value"] == 0 and found["left_to_right"]["parses"]["value"] == 0


def test_the_batch_size_changes_nothing_even_where_the_context_ends() -> None:
    model = model_that_writes("abc", max_position_embeddings=24)
    long = [
        Gap(name="left", before="x" * 20, truth="ab", after=""),
        Gap(name="gap", before="y = ", truth="z" * 12, after=""),
        Gap(name="too long", before="x" * 20, truth="ab", after="cde"),
    ]  # fmt: skip
    one, many = (fill(model, TOKENIZER, long, batch_size=size) for size in (1, 4))
    assert one == many
    assert one["gaps"] == 2 and one["left_out"] == 1


@pytest.mark.parametrize(("given", "options", "said"), [
    (GAPS, {"max_gap": 0}, "max_gap is 0"),
    (GAPS, {"batch_size": 0}, "batch_size is 0"),
    (GAPS[3:], {"max_gap": 6}, "nothing to fill: of 1 gaps none has at most 6 tokens"),
    ([], {}, "nothing to fill"),
    (GAPS, {"threshold": 0.5}, "confidence_threshold"),
])  # fmt: skip
def test_bad_input_is_named(given: list[Gap], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fill(model_that_writes("abc"), TOKENIZER, given, **options)


def test_a_model_without_masks_fills_nothing() -> None:
    with pytest.raises(ValueError, match=r"mask_token_id is None.*convert"):
        fill(tiny(2, vocab_size=len(TOKENIZER), mask_token_id=None, bos_token_id=1), TOKENIZER, GAPS)


def test_figures_by_hand() -> None:
    assert figure([1.0, 0.0, 1.0, 0.0]) == {"value": 0.5, "standard_error": pytest.approx((1 / 3 / 4) ** 0.5)}
    assert figure([2.0]) == {"value": 2.0, "standard_error": None} and figure([])["value"] is None
