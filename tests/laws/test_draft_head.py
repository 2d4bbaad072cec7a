"""The sequential head: what it reads, that it changes no text, and that what is drawn with it has the law of `ar`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from arrivals import model_for
from chances import MASK, drawn, p_value, text_law
from oracles import clean_labels, head_by_hand, layout_of, shaken, texts, tiny
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.adapter import DraftAdapter
from hybrid.checkpoints.convert import convert
from hybrid.draft_head import DraftHead
from hybrid.sampling import Request, Step, decode_all
from hybrid.sampling.schemes import speculation

SPECULATION: list[dict[str, Any]] = [{}, {"fused": True}, {"drafts_per_round": 2}, {"block_size": 3}]


def with_head(prediction: str = "in_place", words: int | None = None, **fields: Any) -> HybridForCausalLM:
    fields = {"peaked": 0.4, "draft_head_size": 12, "draft_words": words, **fields}
    model = tiny(2, diffusion_prediction=prediction, **fields)
    assert model.draft_head is not None
    shaken(model.draft_head)
    return model


def drafts_by_hand(model: HybridForCausalLM, head: DraftHead, text: list[int], count: int) -> list[int]:
    """The likeliest next token, and drafts behind it, from one forward over everything."""
    begin, in_place = len(text), model.config.diffusion_prediction == "in_place"
    width = count + in_place
    labels = [*clean_labels(model, begin), *[(begin + i, begin, 1, 0) for i in range(width)]]
    fill = model.config.mask_token_id
    hidden = model(
        torch.tensor([[*text, *[fill] * width]]), layout=layout_of(labels), output_hidden_states=True
    ).hidden_states[-1][0]
    found = [int(_words(model, model.lm_head(hidden[begin - 1]), None).argmax())]
    state = torch.zeros(head.inner_size, dtype=hidden.dtype)
    for i in range(count):
        row = hidden[begin + i + in_place]
        moved, state = head_by_hand(head, row, model.model.embed_tokens.weight[found[-1]], state)
        found.append(int(_words(model, model.lm_head(moved), head.words).argmax()))
    return found


def _words(model: HybridForCausalLM, logits: Tensor, words: int | None) -> Tensor:
    logits = logits.clone()
    logits[model.config.mask_token_id] = -torch.inf
    if words is not None:
        logits[words:] = -torch.inf
    return logits


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("words", [None, 9])
@torch.no_grad()
def test_drafts_are_those_of_the_formula(prediction: str, words: int | None) -> None:
    model, ids = with_head(prediction, words), texts(5, [6])[0]
    assert model.draft_head is not None
    steps: list[Step] = []
    model.generate(torch.tensor([ids]), mode="speculative", block_size=5, max_new_tokens=20, watchers=[steps.extend])
    roots = [step for step in steps if step.kind == "settle" and step.window]
    text = model.generate(torch.tensor([ids]), max_new_tokens=20)[0].tolist()
    assert len(roots) > 3
    for step in roots:
        want = drafts_by_hand(model, model.draft_head, text[: step.place], 4)
        assert [*step.settled, *step.window] == want[: 1 + len(step.window)]


@pytest.mark.parametrize("options", SPECULATION, ids=str)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("own", ["model", "adapter"])
def test_it_changes_no_text_and_rows_are_as_alone(options: dict[str, Any], prediction: str, own: str) -> None:
    model, adapter = model_for("causal", prediction), None
    if own == "model":
        model = with_head(prediction)
    else:
        adapter = DraftAdapter(model, rank=1, targets=(), head_size=12, words=11)
        assert adapter.head is not None
        shaken(adapter.head)
    prompts = texts(7, [1, 4, 9, 2])
    kwargs = {"mode": "speculative", "draft_adapter": adapter, "max_new_tokens": 17, **options}
    exact, _ = decode_all(model, prompts, max_new_tokens=17)
    found, _ = decode_all(model, prompts, slots=3, **kwargs)
    assert [done.tokens for done in found] == [done.tokens for done in exact]
    asks = [Request(ids, seed=i, temperature=1.2) for i, ids in enumerate(prompts)]
    together, _ = decode_all(model, asks, slots=3, **kwargs)
    for ask, done in zip(asks, together, strict=True):
        assert decode_all(model, [ask], **kwargs)[0][0].tokens == done.tokens
    plain = {**kwargs, "draft_adapter": None}
    bare = model_for("causal", prediction)
    without, _ = decode_all(bare, prompts, slots=3, **plain)
    assert [done.stats.accepted for done in found] != [done.stats.accepted for done in without]  # it does something


@pytest.mark.parametrize(("fused", "words"), [(False, None), (False, 2), (True, None)])
def test_sampled_speculation_has_the_law_of_ar(fused: bool, words: int | None) -> None:
    model = of_three_words(words)
    found, stats = drawn(model, calls=2, mode="speculative", block_size=4, fused=fused, temperature=1.0)
    assert {n for row in stats.rows for n in row.accepted} == {n + (not fused) for n in range(1, 5)}
    assert p_value(found, text_law(model, temperature=1.0)) > 1e-3


def of_three_words(words: int | None = None) -> HybridForCausalLM:
    model = tiny(10, dtype=torch.float32, vocab_size=4, mask_token_id=MASK, draft_head_size=8, draft_words=words)
    assert model.draft_head is not None
    shaken(model.draft_head, 0.8)
    return model


def test_laws_without_the_drafts_before_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that verifies against what the rows say alone, as if drafts had been drawn independently."""
    model, right = of_three_words(), speculation.guessed

    def alone(rows: Any, slots: Any, places: Any, before: Any, read: Any) -> Any:
        law = rows[0].plan.warp.law(read(slots)).split([len(own) for own in slots])
        return [(tokens, own) for (tokens, _), own in zip(right(rows, slots, places, before, read), law, strict=True)]

    monkeypatch.setattr(speculation, "guessed", alone)
    found, _ = drawn(model, calls=2, mode="speculative", block_size=4, temperature=1.0)
    assert p_value(found, text_law(model, temperature=1.0)) < 1e-6


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = with_head(words=9, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    again = HybridForCausalLM.from_pretrained(tmp_path / "model")
    assert again.draft_head is not None and again.draft_head.words == 9
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    adapter = DraftAdapter(model, rank=1, targets=(), head_size=12, words=7)
    assert adapter.head is not None
    shaken(adapter.head)
    adapter.save_pretrained(tmp_path / "adapter")
    read = DraftAdapter.from_pretrained(tmp_path / "adapter", model)
    assert read.head is not None and read.head.words == 7
    for name, weight in adapter.head.state_dict().items():
        assert torch.equal(weight, read.head.state_dict()[name])


def test_a_drafter_gives_a_model_its_head(tmp_path: Path) -> None:
    model = tiny(2, peaked=0.4, dtype=torch.float32)
    adapter = DraftAdapter(model, rank=1, targets=(), head_size=12, words=11)
    assert adapter.head is not None
    shaken(adapter.head)
    options = {"mode": "speculative", "max_new_tokens": 20}
    beside = decode_all(model, [[1, 2]], draft_adapter=adapter, **options)[0][0]
    model.set_draft_head(adapter.head)
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    own = decode_all(again, [[1, 2]], **options)[0][0]
    assert (own.tokens, own.stats.accepted) == (beside.tokens, beside.stats.accepted)
    again.set_draft_head(None)
    assert again.config.draft_head_size is None and again.draft_head is None
    with pytest.raises(ValueError, match="mask_token_id"):
        tiny(2, mask_token_id=None).set_draft_head(adapter.head)
    with pytest.raises(ValueError, match="hidden states of 16, not of 32"):
        tiny(2, hidden_size=32).set_draft_head(adapter.head)


def test_other_software_gets_the_model_without_it(tmp_path: Path) -> None:
    model = with_head(dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "theirs", to="nemotron")
    assert done.warning is not None and "head" in done.warning
    theirs = HybridForCausalLM.from_pretrained(tmp_path / "theirs")
    assert theirs.draft_head is None
    assert torch.equal(theirs.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_fresh_one_is_nothing_at_all() -> None:
    bare, fresh = tiny(2, peaked=0.4), tiny(2, peaked=0.4, draft_head_size=12)
    fresh.load_state_dict(bare.state_dict(), strict=False)
    assert fresh.draft_head is not None and not fresh.draft_head.out.weight.any()
    ids, options = texts(0, [5]), {"mode": "speculative", "block_size": 4, "max_new_tokens": 20}
    plain, headed = (decode_all(m, ids, **options)[0][0] for m in (bare, fresh))
    assert plain.stats.accepted == headed.stats.accepted and plain.tokens == headed.tokens
    state = torch.random.get_rng_state()
    adapter = DraftAdapter(bare, rank=1, targets=(), head_size=12)
    assert adapter.head is not None and not adapter.head.out.weight.any() and adapter.head.from_state.weight.any()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"draft_head_size": 0}, "draft_head_size"),
        ({"draft_head_size": True}, "draft_head_size"),
        ({"draft_head_size": 8, "mask_token_id": None}, "mask_token_id"),
        ({"draft_head_size": 8, "clean_attention": "block"}, "causal"),
        ({"draft_words": 5}, "draft_head_size"),
        ({"draft_head_size": 8, "draft_words": 25}, "vocab_size"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HybridConfig(**{"vocab_size": 24, "mask_token_id": 23, **fields})


def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny(0, dtype=torch.float32)
    wide = tiny(0, dtype=torch.float32, hidden_size=32)
    adapter = DraftAdapter(wide, rank=1, targets=(), head_size=12)
    with pytest.raises(ValueError, match="draft_adapter is for another model"):
        model.generate(torch.tensor([[1]]), mode="speculative", draft_adapter=adapter)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="draft head"):
        DraftAdapter.from_pretrained(tmp_path, model)
    (tmp_path / "draft_head.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="draft head"):
        DraftAdapter.from_pretrained(tmp_path, wide)


def test_only_what_is_asked_for_is_computed() -> None:
    """A root computes one row of logits for the next token, and one for each draft."""
    model = with_head()
    output: Any = model.generate(
        torch.tensor([[1, 2, 3]]), mode="speculative", block_size=4, max_new_tokens=30, return_dict_in_generate=True
    )
    rounds = len(output.stats.rows[0].accepted)
    assert output.stats.logits == 1 + rounds * (4 + 4) + (output.stats.settle - 2 * rounds) * 4
