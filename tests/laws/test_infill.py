"""Filling gaps: both sides are seen, what is given stays, and every rule and kind of model does it."""

from typing import Any

import pytest
import torch
from oracles import MASK, clean_labels, generators, never_mask, padded, raw_logits, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.sampling.reveal import rules

KINDS = [(clean, prediction) for clean in ("causal", "block", "full") for prediction in ("in_place", "next")]
every_kind = pytest.mark.parametrize(("clean", "prediction"), KINDS)


def with_gaps(seed: int, lengths: list[int], gaps: list[list[int]]) -> list[list[int]]:
    rows = texts(seed, lengths)
    for row, places in zip(rows, gaps, strict=True):
        for place in places:
            row[place] = MASK
    return rows


ROWS = with_gaps(1, [12, 7, 9], [[5, 6, 7, 10], [0, 1], [3, 8]])


def slow_infill(model: HybridForCausalLM, row: list[int], threshold: float, block: int | None = None) -> list[int]:
    """One row, every forward over the whole text."""
    config, text = model.config, list(row)
    first, size = text.index(MASK), config.block_size
    start = {"causal": first, "block": first // size * size, "full": 0}[config.clean_attention]
    while MASK in text:
        end = len(text) if block is None else text.index(MASK) + block
        while MASK in text[:end]:
            labels = clean_labels(model, len(text))
            if config.clean_attention != "full":
                labels = labels[:start] + [(i, start, 1, 0) for i in range(start, len(text))]
            logits = never_mask(model, raw_logits(model, text, labels))
            if config.diffusion_prediction == "next":
                logits = torch.stack([logits[max(i - 1, start)] for i in range(len(text))])
            chances, guesses = logits.float().softmax(-1).max(-1)
            hidden = [i for i in range(min(end, len(text))) if text[i] == MASK]
            best = max(hidden, key=chances.tolist().__getitem__)
            for i in hidden:
                if i == best or chances[i] >= threshold:
                    text[i] = int(guesses[i])
    return text


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
def test_scores_of_unequal_gaps_are_those_of_each_row_alone(clean: str) -> None:
    model = tiny(1, clean_attention=clean)
    rows = [[1, MASK, 2, MASK, 3], [MASK, 4, 5, MASK, MASK, 6, MASK], [7, 8, MASK]]
    ids, real = padded(rows, "left")
    out: Any = model.infill(ids, real, output_scores=True, return_dict_in_generate=True)
    assert out.log_probs.shape == (3, 7) and len(out.scores) == 7
    for i, row in enumerate(rows):
        alone: Any = model.infill(torch.tensor([row]), output_scores=True, return_dict_in_generate=True)
        count = len(row) - row.index(MASK)
        assert torch.allclose(out.log_probs[i, :count], alone.log_probs[0]) and not out.log_probs[i, count:].any()
        scores = torch.stack(out.scores, 1)[i]
        assert torch.allclose(scores[:count], torch.stack(alone.scores, 1)[0]) and not scores[count:].any()


@every_kind
@pytest.mark.parametrize("pattern", ["left", "right", "holes"])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_row_is_filled_as_slowly(clean: str, prediction: str, pattern: str, blocks: bool) -> None:
    model = tiny(2, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction)
    ids, mask = padded(ROWS, pattern)
    options: dict[str, Any] = {"block_size": 4} if blocks else {}
    out = model.infill(ids, mask, confidence_threshold=0.3, return_dict_in_generate=True, **options)
    for row, text, real, stats in zip(ROWS, out.sequences, mask.bool(), out.stats.rows, strict=True):
        want = slow_infill(model, row, 0.3, 4 if blocks else None)
        assert text[real].tolist() == want
        assert stats.tokens == row.count(MASK)
    assert torch.equal(out.sequences[mask == 0], ids[mask == 0])
    assert out.past_key_values is None and out.stats.settle == 0


@every_kind
def test_what_stands_behind_a_gap_is_seen(clean: str, prediction: str) -> None:
    model = tiny(2, clean_attention=clean, diffusion_prediction=prediction)
    row = with_gaps(3, [10], [[4, 5, 6]])[0]
    fills = set()
    for last in range(8):
        ids = torch.tensor([[*row[:9], last]])
        fills.add(tuple(model.infill(ids)[0, 4:7].tolist()))
    assert len(fills) > 1


@pytest.mark.parametrize("rule", sorted(rules()))
@pytest.mark.parametrize("clean", ["causal", "full"])
def test_every_rule_fills(rule: str, clean: str) -> None:
    model = tiny(4, clean_attention=clean)
    ids, mask = padded(ROWS, "right")
    filled = model.infill(ids, mask, reveal=rule, do_sample=True, generator=generators(3))
    assert isinstance(filled, Tensor) and not (filled[mask == 1] == MASK).any()
    assert torch.equal(filled[(mask == 1) & (ids != MASK)], ids[(mask == 1) & (ids != MASK)])
    alone = [
        model.infill(torch.tensor([row]), reveal=rule, do_sample=True, generator=g)
        for row, g in zip(ROWS, generators(3), strict=True)
    ]
    assert [text[0].tolist() for text in alone] == [t[m].tolist() for t, m in zip(filled, mask.bool(), strict=True)]


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([[1, 2]], {}, "mask token"),
        ([[1, MASK], [1, 2]], {}, "row"),
        ([[1, MASK]], {"mode": "ar"}, "mode"),
        ([[1, MASK]], {"max_new_tokens": 3}, "max_new_tokens"),
        ([[1, MASK]], {"num_beams": 3}, "num_beams"),
        ([[1, MASK]], {"stop_strings": "a"}, "stop_strings"),
        ([[1, MASK]], {"stopping_criteria": [lambda ids, scores: True]}, "stopping_criteria"),
        ([[1, MASK]], {"auto_allow": ["block"]}, "auto_allow"),
        ([[1] * 256 + [MASK]], {}, "context"),
        ([[1, MASK]], {"fused": True}, "fused"),
    ],
)
def test_bad_gaps(ids: list[list[int]], options: dict[str, Any], words: str) -> None:
    ids = [row + [MASK] * (max(map(len, ids)) - len(row)) for row in ids]
    with pytest.raises(ValueError, match=words):
        tiny().infill(torch.tensor(ids), **options)


def test_a_pure_ar_model_cannot_fill() -> None:
    with pytest.raises(ValueError, match="mask token"):
        tiny(mask_token_id=None).infill(torch.tensor([[1, 2]]))
