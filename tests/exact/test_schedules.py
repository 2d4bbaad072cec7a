"""Schedules of published models, token for token and forward for forward, against slow loops written from their
algorithms. All forwards are over the whole text, without a cache."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracles import MASK, clean_labels, never_mask, next_token, raw_logits, texts, tiny

from hybrid import HybridForCausalLM

PROMPTS = texts(8, [5, 11, 1, 16])


def look(model: HybridForCausalLM, text: Sequence[int], window: Sequence[int]) -> list[tuple[float, int]]:
    """For each slot of a window behind settled text, the likeliest token and how likely it is."""
    start, size = len(text), len(window)
    if model.config.clean_attention == "full":
        labels = clean_labels(model, start + size)
    else:
        labels = clean_labels(model, start) + [(start + i, start, 1, 0) for i in range(size)]
    logits = never_mask(model, raw_logits(model, [*text, *window], labels)).float()
    if model.config.diffusion_prediction == "next":  # row j answers slot j + 1, and the first one itself
        logits = torch.cat([logits[:1], logits[:-1]])
    chances, tokens = logits[start:].softmax(-1).max(-1)
    return list(zip(chances.tolist(), tokens.tolist(), strict=True))


def surest(guesses: Sequence[tuple[float, int]], slots: Sequence[int]) -> list[int]:
    return sorted(slots, key=lambda i: (-guesses[i][0], i))


def up_to(stop: int | None, new: list[int]) -> list[int]:
    return new[: new.index(stop) + 1] if stop in new else new


def stopped(new: Sequence[int], stop: int | None) -> bool:
    """Whether a stop token is shown and nothing before it is hidden."""
    return stop in new and MASK not in new[: new.index(stop)]


# --- Fast-dLLM v2 ---------------------------------------------------------------------------------


def fast_dllm_v2(
    model: HybridForCausalLM, prompt: Sequence[int], blocks: int, threshold: float, stop: int | None
) -> tuple[list[int], int, int]:
    """`generate` of the model file that is released with Fast-dLLM v2's weights: new tokens, drafts, storing forwards.

    What theirs does behind the last block (store it, append one token more) is left out.
    """
    size, text, drafts, stored = model.config.block_size, list(prompt), 0, 0
    if len(text) % size == 0:
        text.append(next_token(model, text))
    for block in range(blocks):
        if stop in text[len(prompt) :]:
            break
        known, start = len(text), len(text) // size * size
        text += [MASK] * (start + size - known)

        while MASK in text and not stopped(text[known:], stop):
            guesses = look(model, text[:start], text[start:])
            drafts += 1
            order = surest(guesses, [i for i in range(size) if text[start + i] == MASK])
            for i in order:
                if i == order[0] or guesses[i][0] > threshold:
                    text[start + i] = guesses[i][1]
        if stopped(text[known:], stop) or block == blocks - 1:
            break
        text.append(next_token(model, text))
        stored += 1
    return up_to(stop, text[len(prompt) :]), drafts, stored


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_fast_dllm_v2(threshold: float) -> None:
    ended = 0
    for seed in range(5):
        model = tiny(seed, clean_attention="block", diffusion_prediction="next", block_size=8, peaked=0.2)
        for prompt in PROMPTS:
            whole, forwards, _ = fast_dllm_v2(model, prompt, 3, threshold, None)
            for stop in (None, whole[2], whole[9]):
                new, drafts, stored = fast_dllm_v2(model, prompt, 3, threshold, stop)
                out: Any = model.generate(
                    torch.tensor([prompt]), mode="block", confidence_threshold=threshold, eos_token_id=stop,
                    max_new_tokens=24 - len(prompt) % 8, return_dict_in_generate=True,
                )  # fmt: skip
                assert out.sequences[0, len(prompt) :].tolist() == new == up_to(stop, whole)
                assert (out.stats.rows[0].draft, out.stats.rows[0].settle) == (drafts, stored)
                ended += drafts < forwards
    assert ended > 20


# --- Nemotron-Labs-Diffusion ----------------------------------------------------------------------


def nemotron(
    model: HybridForCausalLM, prompt: Sequence[int], blocks: int, size: int, threshold: float, stop: int | None
) -> tuple[list[int], int, bool]:
    """`generate` of the model file that is released with Nemotron-Labs-Diffusion's weights: new tokens, drafts, and
    whether a seed ended the text. Theirs looks for the stop after a draft only: it drafts once behind such a seed."""
    text, drafts = list(prompt), 0
    for _ in range(blocks):
        window = [next_token(model, text), *[MASK] * (size - 1)]
        while MASK in window:
            guesses = look(model, text, window)
            drafts += 1
            order = surest(guesses, [i for i in range(size) if window[i] == MASK])
            for i in order:
                if i == order[0] or guesses[i][0] >= threshold:
                    window[i] = guesses[i][1]
            if stopped(window, stop):
                break
        text += window
        if stop in window:
            break
    return up_to(stop, text[len(prompt) :]), drafts, text[len(prompt) :: size][-1] == stop


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_nemotron(threshold: float) -> None:
    ended, seeds = 0, 0
    for seed in range(5):
        model = tiny(seed, peaked=0.2)
        for prompt in PROMPTS:
            whole, forwards, _ = nemotron(model, prompt, 4, 6, threshold, None)
            for stop in (None, whole[0], whole[3], whole[8]):
                new, drafts, by_seed = nemotron(model, prompt, 4, 6, threshold, stop)
                out: Any = model.generate(
                    torch.tensor([prompt]), mode="block", block_size=6, confidence_threshold=threshold,
                    eos_token_id=stop, max_new_tokens=24, return_dict_in_generate=True,
                )  # fmt: skip
                assert out.sequences[0, len(prompt) :].tolist() == new == up_to(stop, whole)
                assert out.stats.rows[0].draft == drafts - by_seed
                ended, seeds = ended + (drafts < forwards), seeds + by_seed
    assert ended > 20 and seeds > 10
