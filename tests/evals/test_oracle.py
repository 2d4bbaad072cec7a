"""The speed-of-light oracle against all sequences of commits, on random tables and on tiny models."""

from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from oracles import MASK, clean_labels, never_mask, next_token, raw_logits, slow_windows, texts, tiny

from hybrid import HybridForCausalLM
from hybrid.evals.laboratory.ceiling import ceiling, reached
from hybrid.evals.laboratory.oracle import Canvas, Found, Look, See, search
from hybrid.evals.likelihood import ar_nll

KINDS = [(clean, prediction) for clean in ("causal", "block", "full") for prediction in ("in_place", "next")]
SIZE = 4  # that of the tiny models' grid


def table(seed: int, good: float) -> See:
    """A model that is a table of random guesses: each hidden slot's favourite with chance `good`, in random order."""

    @cache
    def look(canvas: tuple[int | None, ...]) -> Look:
        random = Random(f"{seed}{canvas}")
        slots = [i for i, token in enumerate(canvas) if token is None]
        random.shuffle(slots)
        return Look(
            slots=tuple(slots), guesses=tuple(i if random.random() < good else random.randrange(9) for i in slots)
        )

    return lambda canvases: [look(tuple(canvas)) for canvas in canvases]


def text_of(given: Canvas, canvas: Canvas, ends: Sequence[int], limit: int | None) -> tuple[int, ...] | None:
    """What a block adds to its text, known slots included; None where some of it is still hidden."""
    text = []
    for old, token in list(zip(given, canvas, strict=True))[:limit]:
        if token is None:
            return None
        text.append(token)
        if old is None and token in ends:
            break
    return tuple(text)


def serial(see: See, given: Canvas, ends: Sequence[int] = (), limit: int | None = None) -> tuple[int, ...]:
    canvas = list(given)
    while (text := text_of(given, canvas, ends, limit)) is None:
        (look,) = see([canvas])
        canvas[look.slots[0]] = look.guesses[0]
    return text


def fewest(
    see: See, given: Canvas, target: Sequence[int], skip_wrong: bool = False, ends: Sequence[int] = (),
    limit: int | None = None,
) -> int:  # fmt: skip
    """By trying every number of surest slots at every draft."""

    @cache
    def count(canvas: tuple[int | None, ...]) -> float:
        if text_of(given, canvas, ends, limit) is not None:
            return 0
        (look,) = see([canvas])
        best, shown = float("inf"), list(canvas)
        for slot, guess in zip(look.slots, look.guesses, strict=True):
            if slot < len(target) and guess != target[slot]:
                if skip_wrong:
                    continue
                break
            shown[slot] = guess
            best = min(best, 1 + count(tuple(shown)))
        return best

    return int(count(tuple(given)))


def replayed(
    see: See, given: Canvas, found: Found, ends: Sequence[int] = (), limit: int | None = None
) -> tuple[int, ...] | None:
    """What comes of showing as many of the surest as the oracle says."""
    canvas = list(given)
    for commit in found.commits:
        (look,) = see([canvas])
        for slot, guess in list(zip(look.slots, look.guesses, strict=True))[:commit]:
            canvas[slot] = guess
    return text_of(given, canvas, ends, limit)


@pytest.mark.parametrize("good", [0.3, 0.7, 0.95])
def test_the_search_against_all_sequences(good: float) -> None:
    greedy_is_worse = 0
    for seed in range(60):
        see, given = table(seed, good), [None, 3, *[None] * 6] if seed % 2 else [0, *[None] * 6]
        target = serial(see, given)
        best = fewest(see, given, target)
        plain = search(see, given, budget=5000)
        whole = search(see, given, budget=5000, exhaustive=True)
        assert plain.target == whole.target == target
        assert plain.serial == whole.serial == given.count(None)
        assert best <= plain.drafts <= plain.serial
        assert whole.drafts == best and whole.optimal and not whole.exhausted
        assert replayed(see, given, plain) == replayed(see, given, whole) == target
        assert not plain.optimal or plain.drafts == best
        greedy_is_worse += plain.drafts > best
        free = search(see, given, budget=5000, exhaustive=True, skip_wrong=True)
        assert free.drafts == fewest(see, given, target, skip_wrong=True) <= best
    if good == 0.7:
        assert greedy_is_worse  # else the exhaustive search would be untested


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("good", [0.3, 0.8])
def test_a_text_that_ends_in_the_block(good: float, limit: int | None) -> None:
    """What is behind its end may be shown or hidden, right or wrong."""
    ended = differ = 0
    for seed in range(60):
        see, given, ends = table(seed, good), [3, *[None] * 6], [3, 4]  # what is known ends nothing
        target = serial(see, given, ends, limit)
        best = fewest(see, given, target, ends=ends, limit=limit)
        plain = search(see, given, budget=5000, ends=ends, limit=limit)
        whole = search(see, given, budget=5000, exhaustive=True, ends=ends, limit=limit)
        assert plain.target == whole.target == target and plain.serial == whole.serial <= 6
        assert best == whole.drafts <= plain.drafts <= plain.serial and whole.optimal
        assert replayed(see, given, plain, ends, limit) == replayed(see, given, whole, ends, limit) == target
        ended += len(target) < 7
        differ += best < fewest(see, given, serial(see, given))
    assert ended > 10 and differ > 10


@pytest.mark.parametrize("budget", [0, 1, 3, 10, 30])
def test_a_budget_is_kept_and_what_was_found_by_then_counts(budget: int) -> None:
    ended = 0
    for seed in range(40):
        asked: list[tuple[int | None, ...]] = []
        look, given = table(seed, 0.8), [0, *[None] * 7]

        def see(canvases: Sequence[Canvas], look: See = look, asked: Any = asked) -> list[Look]:
            asked.extend(map(tuple, canvases))
            return look(canvases)

        found = search(see, given, budget=budget, exhaustive=True)
        assert len(asked) == found.serial + found.forwards and found.forwards <= budget
        assert len(set(asked)) == len(asked)  # nothing is asked twice
        assert replayed(look, given, found) == found.target
        best = fewest(look, given, found.target)
        assert found.drafts >= best and (found.exhausted or found.drafts == best)
        assert not found.optimal or found.drafts == best
        ended += found.exhausted
    assert budget > 10 or ended


def test_a_larger_commit_that_leads_astray_is_not_taken() -> None:
    """All guesses of the first draft are right, and showing three makes the model change its mind about the last."""
    sure = {
        (None,) * 4: Look(slots=(0, 1, 2, 3), guesses=(0, 1, 2, 9)),
        (0, 1, 2, None): Look(slots=(3,), guesses=(8,)),
    }

    def see(canvases: Sequence[Canvas]) -> list[Look]:
        def one(canvas: Canvas) -> Look:
            slots = tuple(i for i, token in enumerate(canvas) if token is None)
            return sure.get(tuple(canvas), Look(slots=slots[::-1], guesses=slots[::-1]))

        return [one(canvas) for canvas in canvases]

    # Serially: 0, then 3, 2, 1 as they are, so that the target is 0 1 2 3.
    found = search(see, [None] * 4, budget=100)
    assert found.target == (0, 1, 2, 3)
    assert found.commits == (2, 2) and fewest(see, [None] * 4, found.target) == 2


# --- On models ----------------------------------------------------------------------------------------------


def model_of(clean: str, prediction: str, seed: int = 3) -> HybridForCausalLM:
    return tiny(seed, clean_attention=clean, diffusion_prediction=prediction, peaked=0.6, eos_token_id=None)


def slow_see(model: HybridForCausalLM, text: Sequence[int], begin: int, limit: int) -> Callable[..., list[Look]]:
    """A draft of one window by a forward over the whole text, without a cache."""
    clean, following = model.config.clean_attention, model.config.diffusion_prediction == "next"

    def see(canvases: Sequence[Canvas]) -> list[Look]:
        looks = []
        for canvas in canvases:
            window = [MASK if token is None else token for token in canvas]
            tokens = [*text[:begin], *window]
            if clean == "full":
                tokens += [MASK] * (limit - len(tokens))
                labels, start = clean_labels(model, limit), 0
            else:
                noisy = [(i, begin, 1, 0) for i in range(begin, len(tokens))]
                labels, start = clean_labels(model, begin) + noisy, begin
            logits = never_mask(model, raw_logits(model, tokens, labels))
            if following:
                logits = torch.stack([logits[i if i == start else i - 1] for i in range(len(tokens))])
            chances, guesses = logits.float().softmax(-1).max(-1)
            hidden = [i for i, token in enumerate(canvas) if token is None]
            hidden.sort(key=lambda i: -float(chances[begin + i]))
            looks.append(Look(slots=tuple(hidden), guesses=tuple(int(guesses[begin + i]) for i in hidden)))
        return looks

    return see


@pytest.mark.parametrize(("clean", "prediction"), KINDS)
@pytest.mark.parametrize("eos", [False, True])
def test_the_serial_decode_is_that_of_generate_and_its_ledger(clean: str, prediction: str, eos: bool) -> None:
    model = model_of(clean, prediction)
    prompts = texts(5, [5, 8, 3, 4])
    given: dict[str, Any] = {"mode": "block", "block_size": SIZE, "max_new_tokens": 11, "reveal": "steps"}
    wanted = [model.generate(torch.tensor([p]), **given)[0, len(p) :].tolist() for p in prompts]  # type: ignore[index]
    if eos:  # tokens that do come up, and cut some of the texts
        model.generation_config.eos_token_id = [wanted[0][3], wanted[1][0]]
    found = ceiling(model, prompts, block_size=SIZE, max_new_tokens=11)
    for prompt, tokens, ours in zip(prompts, found.outputs, found.serial.rows, strict=True):
        out: Any = model.generate(torch.tensor([prompt]), return_dict_in_generate=True, **given)
        (theirs,) = out.stats.rows
        assert tokens == out.sequences[0, len(prompt) :].tolist()
        counted = [(row.tokens, row.free, row.settle, row.draft) for row in (ours, theirs)]
        assert counted[0] == counted[1]
    if eos:
        assert any(len(tokens) < 11 for tokens in found.outputs)
    else:
        assert found.outputs == [slow_windows(model, p, 11, "block", 2.0) for p in prompts] == wanted


@pytest.mark.parametrize(("clean", "prediction"), KINDS)
def test_the_ceiling_of_a_model_is_the_best_of_all_sequences(clean: str, prediction: str) -> None:
    model, (prompt,), count = model_of(clean, prediction), texts(7, [6]), 10
    found = ceiling(model, [prompt], block_size=SIZE, max_new_tokens=count, exhaustive=True, batch_size=3)
    greedy = ceiling(model, [prompt], block_size=SIZE, max_new_tokens=count, batch_size=1)
    assert greedy.outputs == found.outputs
    text, limit, best = list(prompt), len(prompt) + count, []
    following = clean == "causal" or (clean == "block" and prediction == "next")
    while len(text) < limit:
        if following and (clean == "causal" or len(text) % SIZE == 0):
            text.append(next_token(model, text))
            if len(text) == limit:
                break
        begin = {"causal": len(text) - 1, "block": len(text) // SIZE * SIZE, "full": len(text)}[clean]
        end = min(begin + SIZE, limit) if clean == "full" else begin + SIZE
        canvas = [*text[begin:], *[None] * (end - len(text))]
        see = slow_see(model, text, begin, limit)
        room = limit - begin
        target = serial(see, canvas, limit=room)
        best.append(fewest(see, canvas, target, limit=room))
        block, quick = found.blocks[len(best) - 1], greedy.blocks[len(best) - 1]
        assert block.target == target and block.drafts == best[-1] and block.optimal
        assert replayed(see, canvas, block, limit=room) == replayed(see, canvas, quick, limit=room) == target
        assert quick.drafts >= best[-1]
        text = text[:begin] + list(target)
    assert len(found.blocks) == len(best)
    assert found.outputs == [text[len(prompt) : limit]]
    (row,) = found.oracle.rows
    carried = len(best) - 1 if clean == "block" and prediction == "in_place" else 0
    assert row.draft == sum(best) - carried
    record = found.record()
    assert record["tokens_per_forward"] == (row.tokens - row.free) / (row.draft + row.settle)
    assert record["tokens_per_draft"] == (row.tokens - row.free) / row.draft >= record["tokens_per_forward"]
    assert found.serial.tokens_per_forward is not None
    assert found.serial.tokens_per_forward <= record["tokens_per_forward"]
    assert record["optimal_share"] == 1 and record["budget_exhausted_share"] == 0


RULES: dict[str, dict[str, Any]] = {
    "steps": {"reveal": "steps"}, "threshold": {"confidence_threshold": 0.4}, "all": {"reveal": "steps",
    "steps_per_block": 1}, "factor": {"reveal": "factor"},
}  # fmt: skip


def test_no_rule_that_keeps_the_text_is_above_the_ceiling() -> None:
    kept = 0
    for seed in range(4):
        model, prompts = model_of("causal", "in_place", seed), texts(seed, [6, 3, 9])
        for prompt in prompts:
            best = ceiling(model, [prompt], block_size=SIZE, max_new_tokens=9, exhaustive=True)
            found = reached(model, [prompt], best, RULES, max_new_tokens=9)
            one = found["one a draft"]
            assert one == found["steps"]
            ids = torch.tensor([prompt + best.outputs[0]])
            exact = ar_nll(model, ids, torch.arange(ids.shape[1])[None] >= len(prompt))
            assert one["ar_nats_per_token"] == pytest.approx(float(exact) / len(best.outputs[0]))
            assert one["agreement"] == one["exact"] == 1
            assert one["tokens_per_forward"] == best.serial.tokens_per_forward
            for name, row in found.items():
                assert row["of_ceiling"] == pytest.approx(row["tokens_per_forward"] / best.oracle.tokens_per_forward)
                assert (row["exact"] == 1) == (row["agreement"] == 1)
                if row["exact"] == 1 and name not in ("steps", "one a draft"):
                    kept += 1
                    assert row["of_ceiling"] <= 1
            if found["all"]["exact"] == 0:
                assert found["all"]["agreement"] < 1
    assert kept > 1


def test_rules_are_measured_on_all_prompts_whatever_the_batch() -> None:
    model, prompts = model_of("causal", "in_place"), texts(2, [6, 3, 9, 5])
    best = ceiling(model, prompts, block_size=SIZE, max_new_tokens=9)
    one, many = (reached(model, prompts, best, RULES, max_new_tokens=9, batch_size=size) for size in (1, 4))
    assert one == many


@pytest.mark.parametrize(("fields", "given", "said"), [
    ({}, {"prompts": []}, "prompts: there are none"),
    ({}, {"prompts": [[1], []]}, r"prompts\[1\] is empty"),
    ({}, {"budget": -1}, "budget is -1"),
    ({}, {"batch_size": 0}, "batch_size is 0"),
    ({}, {"block_size": 0}, "block_size is 0"),
    ({}, {"max_new_tokens": 300}, "max_new_tokens is 300"),
    ({"clean_attention": "block"}, {"block_size": 3}, "grid of 4"),
    ({"mask_token_id": None}, {}, "mask_token_id is None"),
])  # fmt: skip
def test_bad_input_is_named(fields: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ceiling(tiny(**fields), **{"prompts": [[1, 2]], "block_size": 4, "max_new_tokens": 5, **given})


def test_settings_of_the_models_own_that_change_the_choice_are_refused() -> None:
    model = tiny()
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match=r"generation_config\.json: .*greedy"):
        ceiling(model, [[1, 2]], block_size=4, max_new_tokens=5)
