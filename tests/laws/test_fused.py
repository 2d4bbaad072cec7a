"""Fused speculation is a layout: one forward that says what separate forwards say."""

import torch
from oracles import MASK, cached, padded, places, texts, tiny

from hybrid import Layout


@torch.no_grad()
def test_its_streams_say_what_separate_drafts_say() -> None:
    """Stream a of the fused forward is the draft of the window behind a accepted tokens."""
    model, width, past = tiny(), 5, 7
    text = torch.tensor(texts(1, [past + width]))
    begin = past + 1 + torch.arange(width)[:, None]
    ahead = (begin + torch.arange(width)).flatten()[None]
    stream = 1 + torch.arange(width).repeat_interleave(width)[None]
    streams = Layout.of(ahead, begin.expand(-1, width).flatten()[None], stream)
    cache = cached(model, 1)
    model(text[:, :past], layout=Layout.causal(places(past)), past_key_values=cache)
    cache.commit(past)
    ids = torch.cat([text[:, past:], torch.full_like(ahead, MASK)], 1)
    fused = model(ids, layout=Layout.causal(places(width, past)).cat(streams), past_key_values=cache).logits[0]
    whole = model(text, layout=Layout.causal(places(past + width))).logits[0]
    assert (fused[:width] - whole[past:]).abs().max() < 1e-12
    for accepted in range(width):
        known = past + accepted + 1
        alone = cached(model, 1)
        model(text[:, :known], layout=Layout.causal(places(known)), past_key_values=alone)
        alone.commit(known)
        masks = torch.full((1, width), MASK)
        want = model(masks, layout=Layout.window(places(width, known)), past_key_values=alone).logits[0]
        assert (fused[width * (accepted + 1) :][:width] - want).abs().max() < 1e-12


def test_a_round_is_one_forward() -> None:
    model = tiny(3, peaked=0.4)
    ids, mask = padded(texts(2, [4, 9, 1]), "left")
    for size in (2, 5):
        calls: list[int] = []
        handle = model.register_forward_hook(lambda module, args, out: calls.append(1))  # noqa: B023
        out = model.generate(
            ids, mask, mode="speculative", fused=True, block_size=size, max_new_tokens=20, return_dict_in_generate=True
        )
        handle.remove()
        stats = out.stats
        assert stats.draft == 0 and stats.prefill == 1 and len(calls) == 1 + stats.settle
        for row in stats.rows:
            assert row.settle == len(row.accepted) and row.draft == 0
            assert sum(row.accepted) + row.free >= row.tokens == 20
        assert stats.settle == max(len(row.accepted) for row in stats.rows)
        # What nobody reads is not computed: the window, and of all streams the one that came true.
        rounds = sum(row.settle for row in stats.rows)
        assert stats.logits == 3 * size + rounds * (2 * size - 1)


def test_one_token_drafts_nothing() -> None:
    out = tiny().generate(
        torch.tensor([[1, 2]]), mode="speculative", fused=True, max_new_tokens=1, return_dict_in_generate=True
    )
    assert (out.stats.forwards, out.stats.logits) == (1, 1)


def test_windows_follow_what_is_accepted() -> None:
    """Good drafts keep the window wide; bad ones make it narrow, and cost fewer slots."""
    for peaked, wide in ((0.0, False), (2.0, True)):
        model = tiny(1, peaked=peaked, block_size=16)
        ids = torch.tensor(texts(3, [6]))
        options = {"mode": "speculative", "max_new_tokens": 120, "return_dict_in_generate": True}
        for fused in (False, True):
            free = model.generate(ids, fused=fused, **options)
            fixed = model.generate(ids, fused=fused, block_size=16, **options)
            assert torch.equal(free.sequences, fixed.sequences)
            per_round = free.stats.logits / len(free.stats.rows[0].accepted)
            slots = fixed.stats.logits / len(fixed.stats.rows[0].accepted)
            # Each slot of a fused window brings a stream of masks with it, which is dear however good drafts are.
            assert (per_round > 0.8 * slots) == (wide and not fused)
