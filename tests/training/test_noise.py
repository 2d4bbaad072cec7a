"""Noise is a function of (seed, number of the sample), masks what it says with the probability it says, and
places blocks where decoding will."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid import HybridConfig
from hybrid.noise import SCHEDULES, Noise, Noised, corrupt, seed_clean

MASK, LENGTH = 23, 24


def config_of(**fields: Any) -> HybridConfig:
    settings = {"vocab_size": 24, "mask_token_id": MASK, "hidden_size": 8, "num_attention_heads": 2, "block_size": 4}
    return HybridConfig(**{**settings, **fields})


def rows(count: int, length: int = LENGTH, first: int = 0) -> dict[str, Tensor]:
    """Random text whose targets begin at place `first`; no token is the mask."""
    source = torch.Generator().manual_seed(7)
    return {
        "ids": torch.randint(0, MASK, (count, length), generator=source),
        "target": torch.arange(length).expand(count, -1) >= first,
        "doc": torch.zeros(count, length, dtype=torch.int64),
        "index": torch.arange(count),
    }


def view(noise: Noise, given: dict[str, Tensor], seed: int = 0, **fields: Any) -> Noised:
    return corrupt(**given, noise=noise, config=config_of(**fields), seed=seed)


def facts(noised: Noised, row: int, length: int = LENGTH) -> dict[int, tuple[float, ...]]:
    """Everything the view says of each place of one row."""
    columns = [
        noised.tokens[row], noised.masked[row], noised.weight[row], noised.t[row],
        *noised.layout.labels[:, row].unbind(),
    ]  # fmt: skip
    assert all(len(column) == length - noised.begin for column in columns)
    return {noised.begin + i: values for i, values in enumerate(zip(*(c.tolist() for c in columns), strict=True))}


def blocks(noised: Noised, row: int) -> list[tuple[int, int]]:
    """The (first place, size) of each block of a row, read off the labels."""
    found: list[tuple[int, int]] = []
    for position, block in zip(noised.layout.position[row].tolist(), noised.layout.block[row].tolist(), strict=True):
        if not found or found[-1][0] != block:
            assert position == block or not found, "a block is named after its first place"
            found.append((block, 0))
        found[-1] = (block, found[-1][1] + 1)
    return found


def far_off(hits: float, chances: Tensor) -> float:
    """By how many standard deviations `hits` of independent events with these chances is off."""
    spread = math.sqrt(float((chances * (1 - chances)).sum()))
    return abs(hits - float(chances.sum())) / spread


# --- Of what it is a function -------------------------------------------------------------------------------

KINDS = {
    "default": Noise(),
    "independent times": Noise(antithetic=False, block_sizes=(2, 4, 8), canvas_prob=0.5),
    "drafts": Noise(draft_prob=0.5, offset="grid", t_per="sequence", schedule="cosine"),
    "no seeds": Noise(seed_clean=False, offset="prompt", canvas_prob=0.0, antithetic=False, t_per="sequence"),
    "clipped": Noise(t_range=(0.3, 0.8), schedule="log_linear"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 9])
def test_noise_of_a_sample_depends_on_seed_and_number_alone(kind: str, first: int) -> None:
    given = rows(12, first=first)
    given["index"] = torch.tensor([5, 0, 77, 3, 1000, 2, 9, 8, 4_000_000_000, 1, 6, 7])
    together = view(KINDS[kind], given)
    order = [11, 3, 4, 0, 10, 9, 5, 1, 2, 8, 7, 6]
    for size in (1, 5):
        for at in range(0, 12, size):
            part = order[at : at + size]
            alone = view(KINDS[kind], {name: value[part] for name, value in given.items()})
            for i, row in enumerate(part):
                one, other = facts(alone, i), facts(together, row)
                # A batch shows what the earliest of its rows needs, so views may begin at different places.
                assert all(one[place] == other[place] for place in one.keys() & other.keys())
                assert alone.masked[i].sum() == together.masked[row].sum()


def test_another_seed_or_number_is_other_noise() -> None:
    given = rows(1, 64)
    seen = {
        tuple(view(Noise(), {**given, "index": torch.tensor([index])}, seed).masked[0].tolist())
        for seed in (0, 1)
        for index in range(8)
    }
    assert len(seen) == 16


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    view(Noise(antithetic=False, draft_prob=0.5), rows(4))
    assert torch.equal(torch.get_rng_state(), before)


# --- How much is masked, and what it weighs -----------------------------------------------------------------

# The masking probability as a function of t and eps, from the papers.
PROBABILITY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda t, eps: eps + (1 - eps) * t,
    "log_linear": lambda t, eps: eps + (1 - eps) * t,
    "cosine": lambda t, eps: eps + (1 - eps) * (1 - torch.cos(math.pi / 2 * t)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t_per", ["block", "sequence"])
@pytest.mark.parametrize(("eps", "antithetic"), [(1e-3, True), (0.2, False)])
def test_the_masked_share_is_p_of_the_time_that_is_reported(
    schedule: str, t_per: Any, eps: float, antithetic: bool
) -> None:
    noise = Noise(schedule=schedule, eps=eps, t_per=t_per, antithetic=antithetic, seed_clean=False, canvas_prob=0.3)
    found = view(noise, rows(600, 64))
    chances = PROBABILITY[schedule](found.t.double(), eps)
    assert found.masked.float().mean() > 0.3
    for low in range(8):  # in every range of times: an average could hide a wrong shape
        here = (found.t >= low / 8) & (found.t < (low + 1) / 8)
        assert here.sum() > 2000
        assert far_off(float(found.masked[here].sum()), chances[here]) < 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_masked_slots_weigh_what_the_bound_asks_for(schedule: str, eps: float) -> None:
    found = view(Noise(schedule=schedule, eps=eps, canvas_prob=0.3), rows(64))
    t = found.t.double().requires_grad_()
    p = PROBABILITY[schedule](t, eps)
    (slope,) = torch.autograd.grad(p.sum(), t)
    # p'/p, but for LLaDA's schedule, whose published weight 1/p leaves the constant slope 1 - eps out.
    weight = slope / p / (1 if schedule == "cosine" else 1 - eps)
    torch.testing.assert_close(found.weight.double(), (weight * found.masked).detach(), rtol=1e-5, atol=1e-7)
    assert (found.weight[found.masked] > 0).all()


def test_log_linear_is_what_mdlm_calls_so() -> None:
    """Its sigma, and the times from eps to 1 at which it is taken, as that paper's code does."""
    eps = 1e-3
    found = view(Noise(schedule="log_linear", canvas_prob=0.3, seed_clean=False), rows(64))
    t = eps + (1 - eps) * found.t.double()
    sigma = -torch.log1p(-(1 - eps) * t)
    slope = (1 - eps) / (1 - (1 - eps) * t)
    p, weight = 1 - torch.exp(-sigma), slope / torch.expm1(sigma)
    ours = SCHEDULES["log_linear"](found.t, eps)[0].double()
    assert ((ours - p) / p).abs().max() < 1.01 * eps
    on = found.masked
    assert ((found.weight.double() - weight)[on] / weight[on]).abs().max() < 1e-5
    same = view(Noise(schedule="linear", canvas_prob=0.3, seed_clean=False), rows(64))
    assert torch.equal(same.masked, on) and torch.equal(same.weight, found.weight)


def test_times_lie_in_their_range() -> None:
    found = view(Noise(t_range=(0.3, 0.8)), rows(64))
    assert 0.3 <= found.t.min() < 0.31
    assert 0.79 < found.t.max() <= 0.8


# --- Times --------------------------------------------------------------------------------------------------


def bins(t: Tensor) -> list[int]:
    return torch.histc(t.double(), bins=16, min=0, max=1).int().tolist()


def times(noise: Noise, start: int, place: int, count: int = 256) -> Tensor:
    given = {**rows(count), "index": torch.arange(start, start + count)}
    return view(noise, given, seed=3).t[:, place]


@pytest.mark.parametrize("t_per", ["block", "sequence"])
@pytest.mark.parametrize("start", [0, 1001, 123_456_789])
@pytest.mark.parametrize("place", [0, 20])
def test_antithetic_times_cover_the_unit_interval_evenly(t_per: Any, start: int, place: int) -> None:
    noise = Noise(t_per=t_per, offset="grid", canvas_prob=0.0)
    assert all(abs(count - 16) <= 2 for count in bins(times(noise, start, place)))


def test_antithetic_times_do_not_come_again() -> None:
    assert len(times(Noise(), 0, 0, 4096).unique()) > 4000


def test_antithetic_times_are_even_over_samples_and_blocks_together() -> None:
    noise = Noise(offset="grid", canvas_prob=0.0, block_sizes=(2,))
    given = {**rows(8, 64), "index": torch.arange(500, 508)}
    t = view(noise, given).t[:, ::2].flatten()  # one time of each of the 8 * 32 blocks
    assert all(abs(count - 16) <= 4 for count in bins(t))  # independent ones are off by ten


def test_independent_times_are_independent() -> None:
    t = times(Noise(antithetic=False, offset="grid", canvas_prob=0.0), 0, 0, 1024)
    counts = bins(t)
    assert max(abs(count - 64) for count in counts) > 8  # antithetic ones stay within 2
    chi_squared = sum((count - 64) ** 2 / 64 for count in counts)
    assert 4 < chi_squared < 38  # 15 degrees of freedom: 0.1% at either end


def test_a_time_belongs_to_a_sequence_or_to_a_block() -> None:
    one = view(Noise(t_per="sequence"), rows(16))
    assert (one.t == one.t[:, :1]).all()
    assert len(one.t[:, 0].unique()) == 16
    many = view(Noise(t_per="block", antithetic=False), rows(16))
    seen = set()
    for row in range(16):
        by_block: dict[int, set[float]] = {}
        for t, block in zip(many.t[row].tolist(), many.layout.block[row].tolist(), strict=True):
            by_block.setdefault(block, set()).add(t)
        assert all(len(t) == 1 for t in by_block.values())
        seen |= {(row, *t) for t in by_block.values()}
    assert len(seen) == sum(len(blocks(many, row)) for row in range(16))


# --- Which slots may be masked ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["random", "grid", "prompt"])
def test_seed_slots_are_never_masked(offset: Any) -> None:
    noise = Noise(offset=offset, draft_prob=0.5, block_sizes=(2, 4), seed_clean=True)
    found = view(noise, rows(100, first=3))
    seeds = found.layout.position == found.layout.block
    assert seeds.sum() > 500
    assert not found.masked[seeds].any()
    assert (found.weight[seeds] == 0).all()
    without = view(Noise(offset=offset, draft_prob=0.5, block_sizes=(2, 4), seed_clean=False), rows(100, first=3))
    assert without.masked[seeds].float().mean() > 0.5
    # What is drawn for the other slots does not depend on it.
    assert torch.equal(without.masked[~seeds], found.masked[~seeds])


@pytest.mark.parametrize(
    ("clean", "said", "meant"),
    [("causal", None, True), ("causal", False, False), ("block", None, False), ("block", True, True),
     ("full", None, False), ("full", False, False)],
)  # fmt: skip
def test_models_with_causal_clean_text_have_seeds_unless_told_otherwise(
    clean: str, said: bool | None, meant: bool
) -> None:
    noise = Noise(seed_clean=said, offset="grid", canvas_prob=0.0)
    config = config_of(clean_attention=clean, diffusion_prediction="next")
    assert seed_clean(noise, config) is meant
    found = view(noise, rows(200), clean_attention=clean, diffusion_prediction="next")
    starts = found.layout.position == found.layout.block
    assert bool(found.masked[starts].any()) is not meant


@pytest.mark.parametrize("seeds", [True, False])
def test_first_drafts_mask_whole_blocks_with_weight_1(seeds: bool) -> None:
    sure = view(Noise(draft_prob=1.0, seed_clean=seeds), rows(32))
    shown = (sure.layout.position == sure.layout.block) & seeds
    assert torch.equal(sure.masked, ~shown)
    assert (sure.weight == sure.masked).all()
    assert (sure.t == 1).all()

    some = view(Noise(draft_prob=0.25, seed_clean=seeds, canvas_prob=0.0, offset="grid"), rows(500))
    drafted = some.t.unflatten(1, (-1, 4)) == 1  # no drawn time is exactly 1
    assert torch.equal(drafted.all(2), drafted.any(2)), "a block is drafted as a whole"
    assert far_off(float(drafted[..., 0].sum()), torch.full((500 * 6,), 0.25)) < 4
    in_drafts = drafted.flatten(1)
    shown = (some.layout.position == some.layout.block) & seeds
    assert torch.equal(some.masked[in_drafts], ~shown[in_drafts])
    assert (some.weight[in_drafts & ~shown] == 1).all()
    assert (some.weight[~in_drafts & some.masked] > 1).all()


def test_only_targets_are_masked_and_all_else_is_as_given() -> None:
    given = rows(200)
    source = torch.Generator().manual_seed(1)
    given["target"] = torch.rand(200, LENGTH, generator=source) < 0.5
    given["target"][:, 0] = True
    given["doc"] = torch.tensor([0] * 5 + [1] * 12 + [2] * 4 + [-1] * 3).expand(200, -1).clone()
    found = view(Noise(draft_prob=0.3, seed_clean=False), given)
    assert found.begin == 0
    assert not found.masked[~given["target"]].any()
    assert not found.masked[given["doc"] < 0].any(), "padding has nothing to learn"
    for doc in range(3):
        assert found.masked[given["doc"] == doc].float().mean() > 0.2
    assert torch.equal(found.tokens, torch.where(found.masked, MASK, given["ids"]))
    assert (found.weight[~found.masked] == 0).all()
    assert torch.equal(found.layout.doc, given["doc"])
    assert (found.layout.stream == 1).all()
    assert torch.equal(found.layout.position, torch.arange(LENGTH).expand(200, -1))
    assert found.weight.dtype == found.t.dtype == torch.float32


# --- Complementary masks ------------------------------------------------------------------------------------

PAIRS = {
    "default": Noise(),
    "no seeds": Noise(seed_clean=False, draft_prob=0.3, canvas_prob=0.5),
    "prompt": Noise(offset="prompt", draft_prob=0.5, block_sizes=(2, 5), schedule="cosine"),
    "drafts only": Noise(draft_prob=1.0),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("clean", ["causal", "full"])
def test_two_complementary_views_mask_each_learned_token_once(kind: str, clean: str) -> None:
    noise = PAIRS[kind]
    if clean == "full":
        noise = replace(noise, seed_clean=None)
    given = rows(60, first=3)
    given["doc"][:20, 20:] = -1
    one, two = (view(replace(noise, complementary=on), given, clean_attention=clean) for on in (False, True))
    width = LENGTH - one.begin
    (first, second), begin = two.masked.split(width, dim=1), one.begin
    assert two.begin == begin
    assert torch.equal(first, one.masked), "the first view is the one that there would be without the second"
    learned = (given["target"] & (given["doc"] >= 0))[:, begin:]
    if seed_clean(noise, config_of(clean_attention=clean)):
        learned &= one.layout.position != one.layout.block
    assert not (first & second).any()
    assert torch.equal(first | second, learned)
    assert torch.equal(two.weight, two.masked.float())
    ids = given["ids"][:, begin:]
    assert torch.equal(two.tokens, torch.where(two.masked, MASK, torch.cat([ids, ids], 1)))
    for view_number, layout in enumerate(two.layout.labels.split(width, dim=2), 1):
        assert (layout[2] == view_number).all()
        assert torch.equal(layout[[0, 1, 3]], one.layout.labels[[0, 1, 3]])
    assert torch.equal(two.t, torch.cat([one.t, 1 - one.t], 1))
    if kind == "drafts only":
        assert first.any() and not second.any()
    else:
        assert first.any() and second.any()


# --- Where blocks begin -------------------------------------------------------------------------------------


def expected(length: int, anchor: int, size: int) -> list[tuple[int, int]]:
    """Blocks of `size` with one beginning at `anchor`; what is left over before the first one is a shorter block."""
    starts = sorted({0, *range(anchor % size, length, size)})
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def test_grid_blocks_begin_at_multiples_of_the_size() -> None:
    found = view(Noise(offset="grid", canvas_prob=0.0), rows(8, first=0))
    assert all(blocks(found, row) == expected(LENGTH, 0, 4) for row in range(8))


def test_random_blocks_begin_anywhere() -> None:
    found = view(Noise(offset="random", canvas_prob=0.0), rows(400))
    seen = [blocks(found, row) for row in range(400)]
    for offset in range(4):
        share = seen.count(expected(LENGTH, offset, 4))
        assert far_off(share, torch.full((400,), 0.25)) < 4
    assert all(row in [expected(LENGTH, offset, 4) for offset in range(4)] for row in seen)


@pytest.mark.parametrize("first", [1, 2, 6, 7])
def test_prompt_blocks_are_counted_from_the_first_target(first: int) -> None:
    given = rows(9, first=first)
    given["target"][4] = torch.arange(LENGTH) >= 0  # a row of its own kind, which also keeps the whole view
    found = view(Noise(offset="prompt", canvas_prob=0.0, block_sizes=(4,)), given)
    assert blocks(found, 4) == expected(LENGTH, 0, 4)
    assert all(blocks(found, row) == expected(LENGTH, first, 4) for row in range(9) if row != 4)


def test_block_sizes_are_drawn_per_sequence() -> None:
    found = view(Noise(block_sizes=(2, 3, 8), offset="grid", canvas_prob=0.0), rows(600))
    seen = [blocks(found, row) for row in range(600)]
    for size in (2, 3, 8):
        assert far_off(seen.count(expected(LENGTH, 0, size)), torch.full((600,), 1 / 3)) < 4
    assert sum(seen.count(expected(LENGTH, 0, size)) for size in (2, 3, 8)) == 600


def test_a_canvas_is_one_block_from_anywhere_to_the_end() -> None:
    found = view(Noise(canvas_prob=1.0, offset="grid"), rows(2400))
    begins = []
    for row in range(2400):
        *before, (start, size) = blocks(found, row)
        assert start + size == LENGTH
        assert [*before, (start, size)] == [*((a, n) for a, n in expected(start, 0, 4) if start), (start, size)]
        begins.append(start)
    for place in range(LENGTH):
        assert far_off(begins.count(place), torch.full((2400,), 1 / LENGTH)) < 4.5


def test_a_canvas_after_a_prompt_begins_at_the_first_target() -> None:
    found = view(Noise(canvas_prob=1.0, offset="prompt"), rows(20, first=9))
    assert found.begin == 9
    assert all(blocks(found, row) == [(9, LENGTH - 9)] for row in range(20))


def test_the_share_of_canvases_is_canvas_prob() -> None:
    found = view(Noise(canvas_prob=0.2, offset="prompt"), rows(1000, first=5))
    hits = sum(blocks(found, row)[-1] == (5, LENGTH - 5) for row in range(1000))
    assert far_off(hits, torch.full((1000,), 0.2)) < 4


def test_a_model_without_clean_view_has_one_block() -> None:
    found = view(Noise(), rows(10, first=7), clean_attention="full")
    assert found.begin == 0, "everybody sees the prompt"
    assert (found.layout.block == 0).all()


@pytest.mark.parametrize("offset", ["random", "grid", "prompt"])
@pytest.mark.parametrize("seeds", [True, False])
def test_cropping_loses_no_masked_slot(offset: Any, seeds: bool) -> None:
    noise = Noise(offset=offset, seed_clean=seeds, draft_prob=0.3, block_sizes=(3, 8))
    given = rows(40)
    firsts = torch.randint(9, 16, (40,), generator=torch.Generator().manual_seed(2))
    given["target"] = torch.arange(LENGTH) >= firsts[:, None]
    cropped = view(noise, given)
    assert cropped.begin > 0
    # One more row with a target at the very front makes the batch show all places.
    more = rows(41)
    more = {name: torch.cat([given[name], more[name][40:]]) for name in given}
    whole = view(noise, more)
    assert whole.begin == 0
    for row in range(40):
        shown, full = facts(cropped, row), facts(whole, row)
        assert shown == {place: full[place] for place in shown}
        assert cropped.masked[row].sum() == whole.masked[row].sum()
        # The block of the first target is there from its first slot: the others look at what stands before.
        assert full[int(firsts[row])][5] >= cropped.begin
    assert cropped.masked.sum() > 100


# --- Complaints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "fields", "said"),
    [
        (Noise(draft_prob=1.5), {}, "draft_prob is 1.5"),
        (Noise(canvas_prob=-0.1), {}, "canvas_prob is -0.1"),
        (Noise(t_range=(0.5, 0.5)), {}, "t_range is"),
        (Noise(t_range=(0.5, 1.5)), {}, "t_range is"),
        (Noise(t_range=(-0.1, 1.0)), {}, "t_range is"),
        (Noise(eps=0.0), {}, "eps is 0.0"),
        (Noise(eps=1.0), {}, "eps is 1.0"),
        (Noise(schedule="sine"), {}, "schedule is 'sine'.*linear.*log_linear.*cosine"),
        (Noise(offset="left"), {}, "offset is 'left'"),  # type: ignore[arg-type]
        (Noise(t_per="token"), {}, "t_per is 'token'"),  # type: ignore[arg-type]
        (Noise(block_sizes=(0,)), {}, "block_sizes is"),
        (Noise(block_sizes=(4, LENGTH + 1)), {}, f"block_sizes is .*{LENGTH}"),
        (Noise(), {"block_size": LENGTH + 1}, "block_sizes is"),
        (Noise(block_sizes=(1,), canvas_prob=0.0), {}, "block_sizes is .*seed_clean"),
        (Noise(canvas_prob=0.0), {"clean_attention": "block"}, "clean_attention='block'.*offset='grid'"),
        (Noise(offset="grid"), {"clean_attention": "block"}, "clean_attention='block'.*canvas_prob=0"),
        (Noise(offset="grid", canvas_prob=0.0, block_sizes=(2, 4)), {"clean_attention": "block"}, "block size"),
        (Noise(offset="grid", canvas_prob=0.0, seed_clean=True), {"clean_attention": "block"}, "seed_clean"),
        (Noise(seed_clean=True), {"clean_attention": "full"}, "seed_clean"),
    ],
)
def test_settings_that_do_not_go_together_are_named(noise: Noise, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        noise.check(config_of(**fields), LENGTH)


@pytest.mark.parametrize(
    ("noise", "fields"),
    [
        (Noise(), {}),
        (Noise(block_sizes=(1, LENGTH)), {}),
        (Noise(block_sizes=(1,), seed_clean=False, canvas_prob=0.0), {}),
        (Noise(offset="grid", canvas_prob=0.0), {"clean_attention": "block"}),
        (Noise(offset="grid", canvas_prob=0.0, seed_clean=True),
         {"clean_attention": "block", "diffusion_prediction": "next"}),
        (Noise(t_per="sequence"), {"clean_attention": "full"}),
        (Noise(t_range=(0.0, 1.0), eps=0.5, draft_prob=1.0, canvas_prob=0.0), {}),
    ],
)  # fmt: skip
def test_settings_that_go_together_pass(noise: Noise, fields: dict[str, Any]) -> None:
    noise.check(config_of(**fields), LENGTH)
