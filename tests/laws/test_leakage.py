"""A token that may not be seen leaves no trace, not in one bit; one that may be seen always leaves one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MASK, Label, label, labels_of, layout_of, padded, places, table, texts, tiny, two_streams

from hybrid import HybridForCausalLM, Layout

LENGTH = 16
DOCS = torch.tensor([[0] * 5 + [1] * 7 + [-1] + [2] * 3])

LAYOUTS: dict[str, Callable[[], Layout]] = {
    "causal": lambda: Layout.causal(places(LENGTH)),
    "block": lambda: Layout.blocks(places(LENGTH), 4),
    "uneven blocks": lambda: Layout.blocks(places(LENGTH, 2), 5),
    "full": lambda: Layout.bidirectional(places(LENGTH)),
    "window": lambda: Layout.causal(places(6)).cat(Layout.window(places(LENGTH - 6, 6))),
    "two streams": lambda: two_streams(LENGTH // 2, 4),
    "two streams, clean blocks": lambda: two_streams(LENGTH // 2, 4, "block"),
    "documents and padding": lambda: Layout.causal(places(LENGTH)).where(DOCS >= 0, DOCS),
    "two windows": lambda: (
        Layout.causal(places(4)).cat(Layout.window(places(6, 4), 1)).cat(Layout.window(places(6, 4), 2))
    ),
}


def reachable(layout: Layout, layers: int) -> list[list[bool]]:
    """Whose token has a way to whose logits: every layer lets a token look once, and keep what it had."""
    labels = labels_of(layout)
    direct, count = table(labels, labels), range(len(labels))
    reach = [[i == j for j in count] for i in count]
    for _ in range(layers):
        reach = [
            [reach[i][j] or any(direct[i][k] and reach[k][j] for k in count) for j in count] for i in count
        ]
    return reach


def influence(model: HybridForCausalLM, ids: torch.Tensor, layout: Layout) -> list[list[bool]]:
    """Whose logits change in any bit when a token changes: [query][key]."""
    with torch.no_grad():
        before = model(ids, layout=layout).logits
        changed = []
        for k in range(ids.shape[1]):
            other = ids.clone()
            other[0, k] = (other[0, k] + 1) % MASK
            changed.append((model(other, layout=layout).logits != before).any(-1)[0])
    assert before.isfinite().all()  # of padding too, which sees nobody
    return torch.stack(changed, 1).tolist()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("layers", [1, 2])
def test_exactly_what_may_be_seen_leaves_a_trace(name: str, layers: int) -> None:
    layout, ids = LAYOUTS[name](), torch.tensor(texts(1, [LENGTH]))
    model = tiny(0, num_hidden_layers=layers, qk_norm=layers == 2)
    assert influence(model, ids, layout) == reachable(layout, layers)


@settings(derandomize=True, max_examples=200)
@given(st.lists(label, min_size=5, max_size=5))
def test_depth_reaches_no_further(labels: list[Label]) -> None:
    """The rule is transitive: what one look may not see, no chain of looks does."""
    layout = layout_of(labels)
    assert reachable(layout, 3) == reachable(layout, 1)


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
@pytest.mark.parametrize("pattern", ["left", "right", "holes"])
def test_padding_leaves_no_trace(clean: str, pattern: str) -> None:
    """Whatever stands in the padding, logits of real tokens are those of the row alone."""
    rows = texts(2, [9, 1, 4])
    model = tiny(3, clean_attention=clean)
    with torch.no_grad():
        (ids, real), (other, _) = (padded(rows, pattern, seed=5) for _ in range(2))
        other[real == 0] = (other[real == 0] + 1) % MASK
        one, two = (model(x, attention_mask=real).logits for x in (ids, other))
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            assert torch.equal(one[i][real[i] == 1], two[i][real[i] == 1])
            torch.testing.assert_close(one[i][real[i] == 1], alone, atol=1e-12, rtol=0)
