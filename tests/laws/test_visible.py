"""`visible` says what the words say, for every way to make a layout, and every shortcut says the same."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Label, label, labels_of, layout_of, places, table, two_streams

from hybrid import Layout, visible
from hybrid.layout import AttentionMask, attention_mask, mask_mod
from hybrid.parts import attend

LENGTHS = range(1, 33)
Meaning = Callable[[int, int], bool]


def matrix(queries: int, keys: int, meaning: Meaning) -> list[list[bool]]:
    return [[meaning(i, j) for j in range(keys)] for i in range(queries)]


def seen(query: Layout, key: Layout | None = None) -> list[list[bool]]:
    """The rule for the first row, after a check against the oracle over four integers."""
    key = query if key is None else key
    said: list[list[bool]] = visible(query, key)[0].tolist()
    assert said == table(labels_of(query), labels_of(key))
    return said


# --- Every constructor, from its meaning ----------------------------------------------------------


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_and_bidirectional(length: int, start: int) -> None:
    place = places(length, start)
    for causal in (Layout.causal(place), Layout.blocks(place, 1)):
        assert seen(causal) == matrix(length, length, lambda i, j: j <= i)
    for open_ in (Layout.bidirectional(place), Layout.window(place)):
        assert seen(open_) == matrix(length, length, lambda i, j: True)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks(length: int) -> None:
    for size in range(1, length + 2):
        for start in (0, size - 1):  # the grid is that of positions, not of the tokens given
            layout = Layout.blocks(places(length, start), size)
            meant = matrix(length, length, lambda i, j: (j + start) // size <= (i + start) // size)  # noqa: B023
            assert seen(layout) == meant


@pytest.mark.parametrize("clean", ["causal", "block"])
@pytest.mark.parametrize("length", LENGTHS)
def test_two_streams(length: int, clean: str) -> None:
    for size in range(1, length + 1):

        def meaning(i: int, j: int, size: int = size) -> bool:
            query, key = i % length, j % length  # places in the text; the noisy half comes first
            if i < length:  # a noisy token: its own block's noisy view, and the clean text before that block
                own = key // size == query // size
                return own if j < length else key // size < query // size
            if j < length:  # clean text never sees noise
                return False
            return key <= query if clean == "causal" else key // size <= query // size

        assert seen(two_streams(length, size, clean)) == matrix(2 * length, 2 * length, meaning)


@pytest.mark.parametrize("length", LENGTHS)
def test_windows_over_clean_text(length: int) -> None:
    """Two private windows behind the same text: each sees the text and itself, and nobody sees them."""
    for start in range(1, length):
        count = length - start
        layout = Layout.causal(places(start))
        for stream in (1, 2):
            layout = layout.cat(Layout.window(places(count, start), stream))

        def meaning(i: int, j: int, start: int = start, count: int = count) -> bool:
            if i < start:
                return j <= i
            return j < start or (j - start) // count == (i - start) // count

        assert seen(layout) == matrix(start + 2 * count, start + 2 * count, meaning)


@pytest.mark.parametrize("length", LENGTHS)
def test_padding_and_documents(length: int) -> None:
    """Random documents, -1 being padding: what is visible is what was, within one document."""
    random = Random(length)
    doc = [random.choice([-1, 0, 0, 1, 2]) for _ in range(length)]
    real = torch.tensor([[d >= 0 for d in doc]])
    for layout in (Layout.causal(places(length)), Layout.blocks(places(length), 3), two_streams(length, 3)):
        copies = layout.labels.shape[2] // length
        meant, count = seen(layout), length * copies

        def together(i: int, j: int) -> bool:
            return doc[i % length] == doc[j % length] >= 0

        packed = layout.where(real.repeat(1, copies), torch.tensor([doc]).repeat(1, copies))
        assert seen(packed) == matrix(count, count, lambda i, j: meant[i][j] and together(i, j))  # noqa: B023
        hidden = layout.where(real.repeat(1, copies))
        assert seen(hidden) == matrix(
            count, count, lambda i, j: meant[i][j] and doc[i % length] >= 0 and doc[j % length] >= 0  # noqa: B023
        )  # fmt: skip


def test_choose_takes_whole_rows() -> None:
    one, other = Layout.causal(places(6)), Layout.window(places(6))
    chosen = one.choose(torch.tensor([True, False, True]), other)
    assert visible(chosen, chosen).tolist() == [seen(one), seen(other), seen(one)]


def test_cat_repeats_a_single_row() -> None:
    many = Layout.causal(places(3).expand(4, -1) + torch.arange(4)[:, None])
    both = many.cat(Layout.window(places(2, 3)))
    assert [labels_of(both, row) for row in range(4)] == [
        labels_of(many, row) + labels_of(Layout.window(places(2, 3))) for row in range(4)
    ]


# --- Any labels at all ----------------------------------------------------------------------------

some = st.lists(label, min_size=3, max_size=3)
rows = st.one_of(st.tuples(some), st.tuples(some, some))


@settings(derandomize=True, max_examples=200)
@given(rows, rows)
def test_the_rule_and_its_predicate_say_the_same_of_any_labels(
    queries: tuple[list[Label], ...], keys: tuple[list[Label], ...]
) -> None:
    count = max(len(queries), len(keys))
    query, key = layout_of(*queries), layout_of(*keys)
    meant = [table(queries[b % len(queries)], keys[b % len(keys)]) for b in range(count)]
    assert visible(query, key).tolist() == meant
    b, head, q, k = torch.meshgrid(*(torch.arange(n) for n in (count, 2, 3, 3)), indexing="ij")
    assert mask_mod(query, key)(b, head, q, k).tolist() == [[m, m] for m in meant]


# --- Shortcuts ------------------------------------------------------------------------------------


def spelled_out(mask: AttentionMask, queries: int, keys: int) -> list[list[bool]]:
    """What `scaled_dot_product_attention` makes of it: is_causal counts from the first query and key."""
    if mask.first is not None:
        assert mask.dense is not None
        later = mask.dense[0, 0].tolist()
        seam = queries - len(later)
        return [row + [False] * (keys - seam) for row in spelled_out(mask.first, seam, seam)] + later
    if mask.dense is not None:
        assert not mask.is_causal
        return mask.dense[0, 0].tolist()
    return matrix(queries, keys, lambda i, j: j <= i or not mask.is_causal)


SHORTCUTS = {
    "causal": Layout.causal,
    "window": Layout.window,
    "bidirectional": Layout.bidirectional,
    "blocks": lambda place: Layout.blocks(place, 3),
}


@pytest.mark.parametrize("name", SHORTCUTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_mask_of_a_forward_is_the_rule(length: int, name: str) -> None:
    query = SHORTCUTS[name](places(length))
    assert spelled_out(attention_mask(query), length, length) == seen(query)
    assert spelled_out(attention_mask(query, query), length, length) == seen(query)
    hidden = query.where(torch.tensor([[i % 3 > 0 for i in range(length)]]))
    assert spelled_out(attention_mask(hidden), length, length) == seen(hidden)
    if name == "bidirectional":
        return  # it has no clean text before it
    for past in (1, 6):
        query = SHORTCUTS[name](places(length, past))
        text = Layout.blocks(places(past), 3) if name == "blocks" else Layout.causal(places(past))
        key = text.cat(query)
        assert spelled_out(attention_mask(query, key), length, past + length) == seen(query, key)
        # Stale keys between the text and the query, as uneven rows have them: no shortcut holds.
        stale = Layout.causal(places(past)).where(torch.zeros(1, past, dtype=torch.bool)).cat(key)
        mask = attention_mask(query, stale, even=False)
        assert spelled_out(mask, length, 2 * past + length) == seen(query, stale)


def test_shortcuts_are_taken() -> None:
    """Else the comparison above would compare the rule with itself."""
    prompt, token, window = Layout.causal(places(8)), Layout.causal(places(1, 8)), Layout.window(places(4, 8))
    for mask, is_causal in (
        (attention_mask(prompt), True),
        (attention_mask(token, prompt.cat(token)), False),
        (attention_mask(window, prompt.cat(window)), False),
        (attention_mask(Layout.bidirectional(places(8))), False),
    ):
        assert mask.dense is None and mask.is_causal is is_causal


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("clean", ["causal", "block"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_mask_of_text_beside_its_noisy_view_is_the_rule(length: int, clean: str, documents: bool) -> None:
    text = Layout.causal(places(length)) if clean == "causal" else Layout.blocks(places(length), 3)
    noisy = Layout.of(places(length), places(length) // 3 * 3, 1)
    if documents:
        doc = torch.tensor([[-1 if i % 5 == 4 else i // 7 for i in range(length)]])
        text, noisy = (x.where(doc >= 0, doc) for x in (text, noisy))
    noisy = Layout(noisy.labels[:, :, length // 3 :])  # blocks before the first target are left out
    both = text.beside(noisy)
    mask = attention_mask(both)
    assert mask.first is not None and (mask.first.dense is None) is (clean == "causal" and not documents)
    count = 2 * length - length // 3
    assert spelled_out(mask, count, count) == seen(both) == seen(text.cat(noisy))
    # With other keys than its own tokens, the seam says nothing.
    more = Layout.causal(places(2)).cat(both)
    assert spelled_out(attention_mask(both, more), count, count + 2) == seen(both, more)


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_over_two_streams_is_that_of_the_whole_mask(groups: int) -> None:
    """Values and gradients, in float64, against the softmax written out."""
    source = torch.Generator().manual_seed(5)
    text, noisy = Layout.causal(places(9).expand(2, -1)), Layout.of(places(9), places(9) // 4 * 4, 1)
    both = text.beside(noisy)

    def drawn(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 18, 4, dtype=torch.float64, generator=source, requires_grad=True)

    query, key, value = drawn(2), drawn(groups), drawn(groups)
    weight = torch.randn(2, 2, 18, 4, dtype=torch.float64, generator=source)
    many = [x.repeat_interleave(2 // groups, 1) for x in (key, value)]
    scores = (query @ many[0].transpose(2, 3) / 2).masked_fill(~visible(both, both)[:, None], -torch.inf)
    slow = scores.softmax(-1) @ many[1]
    wanted = torch.autograd.grad((slow * weight).sum(), (query, key, value))
    for seam, right in ((9, True), (10, False)):  # at the wrong place it must not pass
        mask = attention_mask(Layout(both.labels, both.pattern, seam))
        fast = attend(query, key, value, mask, groups == 1)
        found = torch.autograd.grad((fast * weight).sum(), (query, key, value))
        pairs = [(slow, fast), *zip(wanted, found, strict=True)]
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs) is right
