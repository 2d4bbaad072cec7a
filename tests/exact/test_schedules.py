"""Schedules of published models, token for token and forward for forward, against slow loops written from their
algorithms. All forwards are over the whole text, without a cache."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MASK, clean_labels, continuations, never_mask, next_token, padded, raw_logits, texts, tiny

from hybrid import HybridForCausalLM
from hybrid.sampling import Request, decode_all
from hybrid.sampling.choosing.choice import Draws
from hybrid.sampling.reveal import Canvas, rules
from hybrid.sampling.reveal.dream import quotas

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
    model: HybridForCausalLM, prompt: Sequence[int], blocks: int, small: int, threshold: float, stop: int | None
) -> tuple[list[int], int, int]:
    """`generate` of the model file that is released with Fast-dLLM v2's weights: new tokens, drafts, storing forwards.
    A block is filled in small blocks, one after the other.

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
        for first in range(0, size, small):
            part = range(first, min(first + small, size))
            while any(text[start + i] == MASK for i in part) and not stopped(text[known:], stop):
                guesses = look(model, text[:start], text[start:])
                drafts += 1
                order = surest(guesses, [i for i in part if text[start + i] == MASK])
                for i in order:
                    if i == order[0] or guesses[i][0] > threshold:
                        text[start + i] = guesses[i][1]
        if stopped(text[known:], stop) or block == blocks - 1:
            break
        text.append(next_token(model, text))
        stored += 1
    return up_to(stop, text[len(prompt) :]), drafts, stored


@pytest.mark.one_in(5)
@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("small", [2, 3, 8])
def test_fast_dllm_v2(threshold: float, small: int) -> None:
    ended = differ = 0
    for seed in range(4):
        model = tiny(seed, clean_attention="block", diffusion_prediction="next", block_size=8, peaked=0.2)
        for prompt in PROMPTS:
            whole, forwards, _ = fast_dllm_v2(model, prompt, 3, small, threshold, None)
            differ += whole != fast_dllm_v2(model, prompt, 3, 8, threshold, None)[0]
            for stop in (None, whole[2], whole[9]):
                new, drafts, stored = fast_dllm_v2(model, prompt, 3, small, threshold, stop)
                out: Any = model.generate(
                    torch.tensor([prompt]), mode="block", confidence_threshold=threshold, eos_token_id=stop,
                    sub_block_size=None if small == 8 else small, max_new_tokens=24 - len(prompt) % 8,
                    return_dict_in_generate=True,
                )  # fmt: skip
                assert out.sequences[0, len(prompt) :].tolist() == new == up_to(stop, whole)
                assert (out.stats.rows[0].draft, out.stats.rows[0].settle) == (drafts, stored)
                ended += drafts < forwards
    assert ended > 15 and (differ > 0) == (small < 8)


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


def linear_spec(
    model: HybridForCausalLM, prompt: Sequence[int], count: int, size: int, threshold: float, stop: int | None,
    most: float = float("inf"),
) -> tuple[list[int], int, list[int]]:  # fmt: skip
    """Nemotron-Labs-Diffusion's `linear_spec`, greedily: new tokens, drafts, and tokens a round. Theirs fills every
    window; here it is drafted no further than the text can reach, and in `most` drafts."""
    text, limit, drafts, rounds = [*prompt, next_token(model, prompt)], len(prompt) + count, 0, []
    while len(text) < limit and stop not in text[len(prompt) :]:
        window, here = [text[-1], *[MASK] * (size - 1)], 0
        while MASK in window[: limit - len(text) + 1] and not stopped(window[1:], stop):
            guesses = look(model, text[:-1], window)
            here += 1
            order = surest(guesses, [i for i in range(size) if window[i] == MASK])
            for i in order:
                if i == order[0] or guesses[i][0] >= threshold or here == most:
                    window[i] = guesses[i][1]
        drafts, kept = drafts + here, 1
        want = next_token(model, text)
        while kept < size and window[kept] == want:
            text, kept = [*text, want], kept + 1
            want = next_token(model, text)
        text.append(want)
        rounds.append(kept)
    return up_to(stop, text[len(prompt) : limit]), drafts, rounds


@pytest.mark.one_in(5)
@pytest.mark.parametrize("most", [None, 2, 3])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_linear_spec(threshold: float, most: int | None) -> None:
    several = better = 0
    for seed in range(4):
        model = tiny(seed, peaked=0.4)
        for prompt in PROMPTS[:2]:
            ids = torch.tensor([prompt])
            ar = model.generate(ids, max_new_tokens=14)[0, len(prompt) :].tolist()  # type: ignore[index]
            for stop in (None, ar[6]):
                new, drafts, rounds = linear_spec(model, prompt, 14, 5, threshold, stop, most or float("inf"))
                out: Any = model.generate(
                    ids, mode="speculative", block_size=5, confidence_threshold=threshold, drafts_per_round=most,
                    eos_token_id=stop, max_new_tokens=14, return_dict_in_generate=True,
                )  # fmt: skip
                stats = out.stats.rows[0]
                assert out.sequences[0, len(prompt) :].tolist() == new == up_to(stop, ar)
                assert (stats.draft, stats.settle, stats.accepted) == (drafts, len(rounds), rounds)
                several += drafts > len(rounds)
                better += rounds != linear_spec(model, prompt, 14, 5, threshold, stop, 1)[2]
    assert several > 5 and better > 0


MIXED: list[dict[str, Any]] = [
    {}, {"drafts_per_round": 2}, {"confidence_threshold": 0.5}, {"reveal": "random"}, {"block_size": 3},
    {"drafts_per_round": 3, "reveal": "margin", "steps_per_block": 5},
]  # fmt: skip


@pytest.mark.parametrize("sampled", [False, True])
def test_requests_with_different_drafts_share_forwards(sampled: bool) -> None:
    """Each is what it is alone."""
    model, how = tiny(1, peaked=0.4), {"temperature": 1.1} if sampled else {}

    def request(i: int) -> Request:
        return Request(PROMPTS[i % 4], seed=i, **MIXED[i], **how)

    options: dict[str, Any] = {"mode": "speculative", "max_new_tokens": 17}
    together, ledger = decode_all(model, map(request, range(6)), **options)
    for i, done in enumerate(together):
        [alone], _ = decode_all(model, [request(i)], **options)
        assert (done.tokens, done.stats) == (alone.tokens, alone.stats)
    assert ledger.forwards < sum(done.stats.draft + done.stats.settle for done in together)
    assert sum(done.stats.draft > done.stats.settle for done in together) >= 3


# --- SDAR -----------------------------------------------------------------------------------------


def sdar(
    model: HybridForCausalLM, prompt: Sequence[int], blocks: int, steps: int, threshold: float | None
) -> tuple[list[int], list[int]]:
    """`block_diffusion_generate` of SDAR's repository, low_confidence_dynamic or without a threshold
    low_confidence_static: new tokens, and the drafts of each block. Where the quota is more than what is hidden, theirs
    writes over the prompt; this does not."""
    size, text, drafts = model.config.block_size, list(prompt), []
    quota = [size // steps + (step < size % steps) for step in range(steps)]
    for _ in range(blocks):
        start = len(text) // size * size
        window, text, step = [*text[start:], *[MASK] * (start + size - len(text))], text[:start], 0
        while MASK in window:
            guesses = look(model, text, window)
            order = surest(guesses, [i for i in range(size) if window[i] == MASK])
            high = [i for i in order if threshold is not None and guesses[i][0] > threshold]
            for i in high if len(high) >= quota[step] else order[: quota[step]]:
                window[i] = guesses[i][1]
            step += 1
        text += window
        drafts.append(step)
    return text[len(prompt) :], drafts


@pytest.mark.parametrize("threshold", [None, 0.3, 0.85])
@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_sdar(threshold: float | None, steps: int) -> None:
    """Prompts end on the grid and off it. A settled block's forward drafts the next one, where theirs has two."""
    batch = [[*prompt, *prompt, 0][:length] for prompt, length in zip(PROMPTS, (5, 12, 1, 16), strict=True)]
    for seed in range(3):
        model = tiny(seed, clean_attention="block", block_size=6, peaked=0.2)
        for prompt in batch:
            new, drafts = sdar(model, prompt, 4, steps, threshold)
            out: Any = model.generate(
                torch.tensor([prompt]), mode="block", reveal="quota", steps_per_block=steps,
                confidence_threshold=threshold, max_new_tokens=24 - len(prompt) % 6, return_dict_in_generate=True,
            )  # fmt: skip
            assert out.sequences[0, len(prompt) :].tolist() == new
            stats = out.stats.rows[0]
            # The first block is drafted for itself, each of the others once with the one before it.
            assert (stats.settle, stats.draft) == (3, sum(drafts) - 3)


# --- Dream ----------------------------------------------------------------------------------------


def dream_counts(hidden: int, steps: int, eps: str = "0.001") -> list[int]:
    """How many tokens each step shows, with exact numbers."""
    times = [1 - Fraction(i, steps) * (1 - Fraction(eps)) for i in range(steps + 1)]
    counts = []
    for i in range(steps):
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        counts.append(int(hidden * share))
        hidden -= counts[-1]
    return counts


def test_how_many_tokens_dream_shows() -> None:
    assert dream_counts(12, 4) == [2, 3, 3, 4] and dream_counts(13, 5) == [2, 2, 2, 3, 4]
    assert dream_counts(8, 8) == [0, 1, 1, 1, 1, 1, 1, 2] and dream_counts(5, 3) == [1, 1, 3]
    assert dream_counts(32, 8) == [3, 4, 4, 4, 4, 4, 4, 5] and sum(n > 0 for n in dream_counts(128, 128)) == 127
    for eps in ("0.001", "0.00001", "0.01"):  # where no share is a whole number, which float32 would miss
        for hidden in (*range(1, 40), 128):
            for steps in (*range(1, 40), 128, 512):
                wanted = [count for count in dream_counts(hidden, steps, eps) if count]
                assert list(quotas(hidden, steps, float(eps))) == wanted


def dream(
    model: HybridForCausalLM, prompt: Sequence[int], count: int, steps: int, algorithm: str
) -> tuple[list[int], int]:
    """`diffusion_generate` of the sampler that comes with Dream's weights, without the forwards of steps that show
    nothing: new tokens, forwards."""
    text, forwards = [*prompt, *[MASK] * count], 0
    for due in filter(None, dream_counts(count, steps)):
        logits = never_mask(model, raw_logits(model, text, clean_labels(model, len(text)))).float()
        laws = torch.cat([logits[:1], logits[:-1]]).softmax(-1)
        forwards += 1
        best, second = laws.topk(2, -1).values.unbind(-1)
        scores = {
            "maskgit_plus": best, "topk_margin": best - second, "entropy": (laws * (laws + 1e-10).log()).sum(-1),
        }[algorithm].tolist()  # fmt: skip
        hidden = [i for i, token in enumerate(text) if token == MASK]
        for i in sorted(hidden, key=lambda i: (-scores[i], i))[:due]:
            text[i] = int(laws[i].argmax())
    return text[len(prompt) :], forwards


@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("steps", [1, 3, 8, 13, 40])
def test_dream(algorithm: str, steps: int) -> None:
    differ = 0
    for seed in range(3):
        model = tiny(seed, clean_attention="full", diffusion_prediction="next", peaked=0.2)
        ids, mask = padded(PROMPTS, "left")
        options: dict[str, Any] = {"mode": "diffusion", "max_new_tokens": 13, "steps_per_block": steps}
        out: Any = model.generate(
            ids, mask, reveal="dream", dream_alg=algorithm, return_dict_in_generate=True, **options
        )
        for prompt, new, stats in zip(PROMPTS, continuations(out, ids.shape[1]), out.stats.rows, strict=True):
            assert (new, stats.draft) == dream(model, prompt, 13, steps, algorithm)
        other = {"maskgit_plus": "steps", "topk_margin": "margin", "entropy": "entropy"}[algorithm]
        differ += not torch.equal(out.sequences, model.generate(ids, mask, reveal=other, **options))
    assert (differ > 0) == (steps > 1), "an even pace is another schedule"


# --- Fast-dLLM's threshold for Dream --------------------------------------------------------------


def capped(confidence: Callable[[int], Sequence[float]], count: int, steps: int, threshold: float) -> list[set[int]]:
    """Which slots each draft shows, by the state machine of Fast-dLLM's `generation_utils.py` for Dream."""
    share, left, hidden, shown, step = count // steps, 0, set(range(count)), [], 0
    while step < steps:
        sure = confidence(step)
        most, left = share + left, 0
        order = sorted(hidden, key=lambda i: (-sure[i], i))[:most]
        good = [i for i in order if i == order[0] or sure[i] >= threshold]
        left = len(order) - len(good)
        if left and step == steps - 1:
            share, steps = 0, steps + 1
        hidden -= set(good)
        shown.append(set(good))
        step += 1
    assert not hidden
    return shown


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 5), st.floats(0.05, 1))
def test_a_threshold_under_a_cap(seed: int, steps: int, share: int, threshold: float) -> None:
    random, tables = Random(seed), []
    count = steps * share

    def confidence(step: int) -> Sequence[float]:
        while len(tables) <= step:
            tables.append([random.randrange(64) / 64 for _ in range(count)])  # exact in float32, and with ties
        return tables[step]

    rule, hidden = rules()["capped"](threshold, steps), torch.ones(1, count, dtype=torch.bool)
    for step, want in enumerate(capped(confidence, count, steps, threshold)):
        zero = torch.zeros(1, count, dtype=torch.int64)
        canvas = Canvas(
            tokens=zero, hidden=hidden, drafted=~hidden, confidence=zero, guess=zero,
            certainty=torch.tensor([confidence(step)]), step=torch.tensor([step]), steps=steps,
            width=torch.tensor([count]), must=torch.tensor([True]), order=zero, draws=Draws([]), mask_token_id=MASK,
        )  # fmt: skip
        left = rule(canvas, torch.empty(0))[1]
        assert set((hidden & ~left)[0].nonzero().flatten().tolist()) == want
        hidden = left
    assert not hidden.any()
