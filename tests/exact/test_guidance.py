"""Classifier-free guidance of LLaDA's kind, against its published loop written out slowly."""

from typing import Any

import pytest
import torch
from oracles import MASK, padded, places, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM, Layout
from hybrid.sampling import Request, decode_all

NEW = 8


@torch.no_grad()
def by_hand(model: HybridForCausalLM, prompt: list[int], scale: float, block: int, steps: int) -> list[int]:
    """A token by token reading of the loop: `cfg_scale` is `scale - 1` there."""
    canvas = torch.tensor([[*prompt, *[MASK] * NEW]])
    layout, shift = Layout.bidirectional(places(canvas.shape[1])), model.config.diffusion_prediction == "next"

    def predict(ids: Tensor) -> Tensor:
        logits = model(ids, layout=layout).logits
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if shift else logits

    for begin in range(len(prompt), len(prompt) + NEW, block):
        for step in range(steps):
            blind = canvas.clone()
            blind[0, : len(prompt)] = MASK
            unguided = predict(blind)
            logits = unguided + (scale - 1 + 1) * (predict(canvas) - unguided)
            logits[..., MASK] = -torch.inf
            best = logits.argmax(-1)
            sure = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
            open_ = canvas == MASK
            open_[:, begin + block :] = False
            count = -(-int(open_.sum()) // (steps - step))
            for place in sure.masked_fill(~open_, -1).argsort(dim=1, descending=True, stable=True)[0, :count].tolist():
                canvas[0, place] = best[0, place]
    return canvas[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 1.5, 4.0])  # at 0 all hidden slots of a hidden prompt are alike
@pytest.mark.parametrize(("block", "steps"), [(NEW, 4), (4, 2), (4, 4)])
def test_guidance_is_the_published_one(prediction: str, scale: float, block: int, steps: int) -> None:
    model = tiny(3, clean_attention="full", diffusion_prediction=prediction)
    rows = texts(2, [5, 3, 7])
    ids, real = padded(rows, "left")
    options: dict[str, Any] = {"max_new_tokens": NEW, "steps_per_block": steps}
    options |= {"mode": "diffusion"} if block == NEW else {"mode": "block", "block_size": block}
    out: Any = model.generate(ids, real, guidance_scale=scale, return_dict_in_generate=True, **options)
    assert out.sequences[:, ids.shape[1] :].tolist() == [by_hand(model, row, scale, block, steps) for row in rows]
    plain = model.generate(ids, real, **options)
    assert torch.equal(out.sequences, plain) == (scale == 1)
    assert out.stats.draft == (NEW // block) * steps  # one forward a draft, over two canvases


def test_rows_of_one_session_have_their_own_guidance() -> None:
    model, row = tiny(3, clean_attention="full"), texts(2, [5])[0]
    scales = (1.0, 2.0, 4.0)
    requests = [Request(row, guidance_scale=scale) for scale in scales]
    done, _ = decode_all(model, requests, mode="diffusion", max_new_tokens=NEW, steps_per_block=4)
    assert [d.tokens for d in done] == [by_hand(model, row, scale, NEW, 4) for scale in scales]


def test_where_it_is_stored_and_where_it_is_not_had() -> None:
    model, ids = tiny(3, clean_attention="full"), torch.tensor(texts(2, [5]))
    options: dict[str, Any] = {"mode": "diffusion", "max_new_tokens": NEW, "steps_per_block": 4}
    want = model.generate(ids, guidance_scale=2.0, **options)
    model.generation_config.guidance_scale = 2.0
    assert torch.equal(model.generate(ids, **options), want)
    assert not torch.equal(model.generate(ids, guidance_scale=1.0, **options), want)
    for value in (-1.0, "much", True):
        with pytest.raises(ValueError, match=f"guidance_scale is {value!r}"):
            model.generate(ids, **{**options, "guidance_scale": value})
    with pytest.raises(ValueError, match="guidance_scale: cache='dual'"):
        model.generate(ids, cache="dual", **options)
    for clean in ("causal", "block"):
        with pytest.raises(ValueError, match="guidance_scale: only mode='ar'"):
            tiny(3, clean_attention=clean).generate(ids, mode="block", guidance_scale=2.0)
