"""The cache is exact: whatever was written, taken back or moved, it says what a fresh forward says."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    MASK,
    cached,
    clean_labels,
    continuations,
    late,
    layout_of,
    padded,
    places,
    raw_logits,
    texts,
    tiny,
)
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.law import Law

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 2},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "normed": {"qk_norm": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "biased and tied": {"attention_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 3},
}


class Session:
    """A cache, the text that it should hold, and moves that check one against the other."""

    def __init__(self, model: HybridForCausalLM, rows: int, seed: int) -> None:
        self.model, self.random = model, Random(seed)
        self.size = model.config.block_size
        self.unit = 1 if model.config.clean_attention == "causal" else self.size  # what is committed at once
        self.text: list[list[int]] = [[] for _ in range(rows)]
        self.cache = cached(model, rows)

    def tokens(self, count: int) -> Tensor:
        return torch.tensor(texts(self.random.random(), [count] * len(self.text)))

    def place(self, count: int) -> Tensor:
        return torch.tensor([[len(row)] for row in self.text]) + torch.arange(count)

    @torch.no_grad()
    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        return self.model(ids, layout=layout, past_key_values=self.cache).logits

    def junk(self) -> None:
        """Write what nobody commits, clean or noisy."""
        count = self.random.randint(1, 9)
        place = self.place(count)
        noisy = self.random.random() < 0.5
        self.forward(self.tokens(count), Layout.window(place) if noisy else Layout.causal(place))

    def extend(self) -> None:
        """Write clean tokens and keep some of them, in every row a number of its own or in all the same."""
        self.junk()
        count = self.random.randint(1, 3) * self.unit
        ids = self.tokens(count)
        logits = self.forward(ids, Law.of(self.model.config).clean(self.place(count)))
        for row, new in enumerate(ids.tolist()):
            text = self.text[row] + new
            close(logits[row], raw_logits(self.model, text, clean_labels(self.model, len(text)))[-count:])
        even = self.random.randint(0, count // self.unit)
        keep = [self.random.choice([even, self.random.randint(0, count // self.unit)]) for _ in self.text]
        self.cache.commit([self.unit * n for n in keep])
        for text, new, n in zip(self.text, ids.tolist(), keep, strict=True):
            text += new[: self.unit * n]

    def draft(self) -> None:
        """Look from a noisy window, and keep nothing."""
        self.junk()
        count = self.random.randint(1, 6)
        shown = torch.tensor([self.random.random() < 0.5 for _ in range(count)])
        ids = self.tokens(count).where(shown, MASK)
        logits = self.forward(ids, Layout.window(self.place(count)))
        for row, window in enumerate(ids.tolist()):
            start = len(self.text[row])
            labels = clean_labels(self.model, start) + [(start + i, start, 1, 0) for i in range(count)]
            close(logits[row], raw_logits(self.model, self.text[row] + window, labels)[start:])

    def mixed(self) -> None:
        """In one forward some rows draft and others settle."""
        count = self.size
        ids, place = self.tokens(count), self.place(count)
        drafting = torch.tensor([self.random.random() < 0.5 for _ in self.text])
        clean = Law.of(self.model.config).clean(place)
        logits = self.forward(ids, Layout.window(place).choose(drafting, clean))
        self.cache.commit([0 if drafts else count for drafts in drafting.tolist()])
        for row, new in enumerate(ids.tolist()):
            start = len(self.text[row])
            labels = clean_labels(self.model, start + count)
            if drafting[row]:
                labels[start:] = [(start + i, start, 1, 0) for i in range(count)]
            close(logits[row], raw_logits(self.model, self.text[row] + new, labels)[start:])
            self.text[row] += [] if drafting[row] else new

    def rewind(self) -> None:
        lengths = [self.unit * self.random.randint(0, len(row) // self.unit) for row in self.text]
        self.cache.rewind(lengths)
        self.text = [row[:length] for row, length in zip(self.text, lengths, strict=True)]

    def select(self) -> None:
        """Rows in another order, some twice, some gone."""
        self.junk()
        rows = self.random.choices(range(len(self.text)), k=self.random.randint(2, 4))
        self.cache.select(rows)
        self.text = [list(self.text[row]) for row in rows]

    def reserve(self) -> None:
        self.cache.reserve(self.cache.ids.shape[1] + self.random.randint(0, 5))

    def check(self) -> None:
        assert self.cache.lengths == [len(row) for row in self.text]
        assert [self.cache.ids[i, : len(row)].tolist() for i, row in enumerate(self.text)] == self.text


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


MOVES = [Session.extend, Session.draft, Session.mixed, Session.rewind, Session.select, Session.reserve]


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("clean", ["causal", "block"])
@settings(derandomize=True, max_examples=10)
@given(
    moves=st.lists(st.sampled_from(MOVES), min_size=6, max_size=12),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_cached_forward_is_a_fresh_one(
    clean: str, fields: dict[str, Any], moves: list[Any], rows: int, seed: int
) -> None:
    session = Session(tiny(seed, clean_attention=clean, block_size=3, **fields), rows, seed)
    session.extend()
    for move in moves:
        move(session)
        session.check()
    session.extend()
    session.draft()


def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit keeps what was to be rolled back."""
    right = KVCache.commit
    monkeypatch.setattr(KVCache, "commit", lambda cache, n: right(cache, cache._written))


def forget_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`select` moves keys, values and ids, and leaves the labels where they were."""
    right = KVCache.select

    def wrong(cache: KVCache, rows: Any) -> None:
        labels = cache.labels
        right(cache, rows)
        cache.labels = labels[:, torch.arange(len(rows)) % labels.shape[1]]

    monkeypatch.setattr(KVCache, "select", wrong)


def show_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was rolled back behind a shorter row's slots keeps its document."""
    right = KVCache.open

    def wrong(cache: KVCache, layout: Layout, ids: Tensor) -> Layout:
        before = cache.labels.clone()
        cache.reserve(max(cache.lengths) + ids.shape[1])
        seen = right(cache, layout, ids)
        count = min(seen.labels.shape[2], before.shape[2])
        new = seen.labels[3, :, :count]
        new.copy_(torch.where(new < 0, before[3, : len(new), :count], new))
        return seen

    monkeypatch.setattr(KVCache, "open", wrong)


@pytest.mark.parametrize("mutant", [keep_all, forget_labels, show_stale])
def test_a_broken_cache_would_be_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(10):
            session = Session(tiny(seed, block_size=3), 3, seed)
            for move in [Session.extend, Session.rewind, Session.select, Session.draft, Session.mixed] * 3:
                move(session)
                session.check()


def test_rows_that_rest_are_left_alone() -> None:
    """Forwards concern the first `active` rows; `select` wakes the others."""
    model, text = tiny(), texts(0, [6, 6, 6])
    cache = cached(model, 3)
    with torch.no_grad():
        model(torch.tensor(text), layout=Layout.causal(places(6)), past_key_values=cache)
        cache.commit([3, 4, 6])
        cache.active = 2
        for _ in range(3):
            place = torch.tensor(cache.lengths[:2])[:, None] + torch.arange(2)
            model(torch.tensor([[1, 2], [3, 4]]), layout=Layout.causal(place), past_key_values=cache)
            cache.commit([2, 1])
        assert cache.lengths == [9, 7, 6]
        cache.select([2, 0, 1])
        assert cache.lengths == [6, 9, 7] and cache.active == 3
        whole = [text[2], text[0][:3] + [1, 2] * 3, text[1][:4] + [3] * 3]
        place = torch.tensor([[6], [9], [7]])
        last = torch.tensor([[5], [5], [5]])
        logits = model(last, layout=Layout.causal(place), past_key_values=cache).logits
    for row, ids in enumerate(whole):
        close(logits[row], raw_logits(model, [*ids, 5], clean_labels(model, len(ids) + 1))[-1:])


# --- Clean forwards as transformers knows them ----------------------------------------------------


@pytest.mark.parametrize("pattern", ["left", "right", "holes"])
@pytest.mark.parametrize("given_mask", [True, False])
def test_a_forward_without_a_layout_keeps_its_tokens(pattern: str, given_mask: bool) -> None:
    """Any padding at first, then token by token, with a mask that covers what the cache holds, or none."""
    model, rows = tiny(1), texts(1, [5, 2, 7])
    ids, real = padded(rows, pattern)
    with torch.no_grad():
        output = model(ids, attention_mask=real, use_cache=True)
        cache: Any = output.past_key_values
        for i, row in enumerate(rows):
            close(output.logits[i][real[i] == 1], raw_logits(model, row, clean_labels(model, len(row))))
        for step in range(3):
            new = torch.tensor([[step + 1], [step + 2], [step + 3]])
            real = torch.cat([real, torch.ones(3, 1, dtype=torch.int64)], 1)
            logits = model(new, attention_mask=real if given_mask else None, past_key_values=cache).logits
            rows = [row + token for row, token in zip(rows, new.tolist(), strict=True)]
            for i, row in enumerate(rows):
                close(logits[i], raw_logits(model, row, clean_labels(model, len(row)))[-1:])
    assert cache.lengths == [8, 5, 10]


# --- One cache through every mode -----------------------------------------------------------------

LEGS = [
    ("causal", ("ar", "block", "speculative", "ar", "diffusion", "block")),
    ("causal", ("speculative", "diffusion", "ar", "block", "block", "speculative")),
    ("block", ("block", "diffusion", "block", "block")),
]


def assert_holds(cache: KVCache, model: HybridForCausalLM, whole: Sequence[Sequence[int]]) -> None:
    """The cache holds a beginning of each text, as a fresh forward over that text would have written it."""
    for row, text in enumerate(whole):
        length = cache.lengths[row]
        assert length <= len(text)
        assert cache.ids[row, :length].tolist() == list(text[:length])
        if not length:
            continue
        fresh = cached(model, 1)
        with torch.no_grad():
            layout = layout_of(clean_labels(model, length))
            model(torch.tensor([text[:length]]), layout=layout, past_key_values=fresh)
        assert torch.equal(cache.labels[:, row, :length], fresh.labels[:, 0, :length])
        for have, want in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            close(have[:, row, :, :length], want[:, 0, :, :length])


@pytest.mark.parametrize(("clean", "legs"), LEGS)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("ends", [False, True])
def test_one_cache_goes_through_every_mode(
    clean: str, legs: tuple[str, ...], prediction: str, ends: bool
) -> None:
    """Every leg, begun with the cache of the one before, is what it is from the text alone. Where end-of-text
    tokens occur, rows end at different times, and then go on behind them."""
    model = tiny(2, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction)
    whole, cache, ragged = texts(3, [5, 1, 8, 4]), None, False
    for number, mode in enumerate(legs):
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 7, "return_dict_in_generate": True}
        ids, real = padded(whole, ("right", "left", "holes")[number % 3])
        fresh = continuations(model.generate(ids, real, **options), ids.shape[1])
        if ends:
            options["eos_token_id"] = [fresh[number % 4][2], fresh[0][-2]]
            fresh = continuations(model.generate(ids, real, **options), ids.shape[1])
        output: Any = model.generate(ids, real, past_key_values=cache, **options)
        new, cache = continuations(output, ids.shape[1]), output.past_key_values
        assert new == fresh
        ragged |= len(set(map(len, new))) > 1
        whole = [row + more for row, more in zip(whole, new, strict=True)]
        assert_holds(cache, model, whole)
        assert cache.active == len(whole)
    assert ragged == ends


@pytest.mark.parametrize(
    ("clean", "mode"),
    [*(("causal", mode) for mode in ("ar", "block", "diffusion", "speculative")), ("block", "block")],
)
@pytest.mark.parametrize("ends", [False, True])
def test_a_cache_never_holds_what_was_not_returned(clean: str, mode: str, ends: bool) -> None:
    """Where the limit or an end-of-text token cuts a window that was accepted further than that."""
    model, rows = tiny(5, peaked=0.8, clean_attention=clean), texts(5, [5, 1, 8, 4])
    ids, real = padded(rows, "left")
    options: dict[str, Any] = {"mode": mode, "return_dict_in_generate": True}
    free = continuations(model.generate(ids, real, max_new_tokens=12, **options), ids.shape[1])
    if ends:
        options["eos_token_id"] = [late(row) for row in free]
    cut = 0
    for count in range(1, 13):
        output: Any = model.generate(ids, real, max_new_tokens=count, **options)
        new = continuations(output, ids.shape[1])
        assert_holds(output.past_key_values, model, [a + b for a, b in zip(rows, new, strict=True)])
        cut += sum(max(0, sum(row.accepted) - row.tokens + row.free) for row in output.stats.rows)
    assert mode != "speculative" or cut > 0, "nothing was cut off, so nothing was tested"


def test_a_cache_goes_on_with_other_rows() -> None:
    """Between two calls: rows repeated, dropped and reordered with `select`, and text that the user added."""
    model, rows = tiny(4, peaked=0.4), texts(4, [5, 1, 8])
    options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    ids, real = padded(rows, "left")
    first: Any = model.generate(ids, real, mode="block", **options)
    whole = [row + new for row, new in zip(rows, continuations(first, ids.shape[1]), strict=True)]
    cache, order = first.past_key_values, [2, 2, 0]
    cache.select(order)
    whole = [whole[row] + [3, 4, 5][:i] for i, row in enumerate(order)]
    ids, real = padded(whole, "right")
    again = model.generate(ids, real, mode="speculative", past_key_values=cache, **options)
    new = continuations(again, ids.shape[1])
    assert new == continuations(model.generate(ids, real, mode="speculative", **options), ids.shape[1])
    assert_holds(cache, model, [row + more for row, more in zip(whole, new, strict=True)])


@pytest.mark.parametrize("mode", ["ar", "block", "speculative"])
def test_a_cache_may_lack_much_of_one_row_and_little_of_another(mode: str) -> None:
    model = tiny()
    short, long = texts(4, [3, 40])
    ids, mask = padded([short, long], "right")
    cache = model.generate(ids, mask, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    ids, mask = padded([short + texts(5, [38])[0], long], "right")
    again = model.generate(ids, mask, mode=mode, max_new_tokens=2, past_key_values=cache)
    assert torch.equal(again, model.generate(ids, mask, mode=mode, max_new_tokens=2))
