"""How often texts come up, held against the law that they should have."""

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from oracles import clean_labels, continuations, raw_logits
from scipy.stats import chisquare
from torch import Tensor

from hybrid import HybridForCausalLM

MASK = 3
PROMPT = [0, 2]
LENGTH = 4
Law = dict[tuple[int, ...], float]
# Of `drawn`: enough for what is wrong to show, and with the slow tests more, for what is a little wrong. It goes below
# other parameters, so that of those, `one_in` looks at the fast ones first.
CALLS = pytest.mark.parametrize("calls", [1, pytest.param(4, marks=pytest.mark.slow)])


def next_law(logits: Tensor, temperature: float, top_p: float = 1.0) -> list[float]:
    """The warped distribution over three tokens, in plain numbers."""
    scores = [x / temperature for x in logits[:MASK].tolist()]
    weights = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    kept, mass = set(), 0.0
    for token in sorted(range(MASK), key=lambda i: -weights[i]):  # the fewest tokens that reach top_p
        if mass < top_p:
            kept.add(token)
        mass += weights[token]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(MASK)]


def text_law(model: HybridForCausalLM, **warp: float) -> Law:
    """The probability of every text of LENGTH tokens, decoded from left to right."""
    law = {}
    for text in product(range(MASK), repeat=LENGTH):
        whole = [*PROMPT, *text]
        logits = raw_logits(model, whole, clean_labels(model, len(whole)))
        chance = 1.0
        for i, token in enumerate(text):
            chance *= next_law(logits[len(PROMPT) - 1 + i], **warp)[token]
        law[text] = chance
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


def drawn(model: HybridForCausalLM, calls: int, **options: Any) -> tuple[Counter[Any], Any]:
    """How often each text comes up in 4096 rows a call, and the stats of the last call."""
    options |= {"max_new_tokens": LENGTH, "do_sample": True, "return_dict_in_generate": True}
    options["generator"] = torch.Generator().manual_seed(0)
    ids, found = torch.tensor([PROMPT] * 4096), Counter[Any]()
    for _ in range(calls):
        output: Any = model.generate(ids, **options)
        found.update(map(tuple, continuations(output, len(PROMPT))))
    return found, output.stats


def p_value(found: Counter[Any], law: Law) -> float:
    """Of the chi-square test; texts that are expected fewer than five times count together."""
    count = found.total()
    assert not set(found) - {text for text, chance in law.items() if chance > 0}, "an impossible text"
    common = [text for text, chance in law.items() if chance * count >= 5]
    expected = [law[text] * count for text in common]
    observed = [found[text] for text in common]
    expected, observed = [*expected, count - sum(expected)], [*observed, count - sum(observed)]
    if expected[-1] < 5:
        expected[-2:], observed[-2:] = [sum(expected[-2:])], [sum(observed[-2:])]
    return float(chisquare(observed, expected).pvalue)
