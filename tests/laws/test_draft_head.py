"""The draft head: what it reads, that it changes no text, and that what is drawn with it has the law of `ar`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from arrivals import model_for
from chances import CALLS, MASK, drawn, p_value, text_law
from oracles import head_by_hand, shaken, texts, tiny
from safetensors.torch import load_file

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.adapters.draft_head import Reader
from hybrid.checkpoints.convert import convert
from hybrid.formats import formats
from hybrid.sampling import Request, Step, decode_all
from hybrid.sampling.schemes import speculation

SPECULATION: list[dict[str, Any]] = [{}, {"fused": True}, {"drafts_per_round": 2}, {"block_size": 3}]
AHEAD = SPECULATION[::3]  # the others are read off masks


def with_head(prediction: str = "in_place", words: int | list[int] | None = None, **fields: Any) -> HybridForCausalLM:
    fields = {"peaked": 0.4, "draft_head_size": 12, "draft_words": words, "draft_rank": 5, **fields}
    model = tiny(2, diffusion_prediction=prediction, **fields)
    assert model.draft_head is not None
    shaken(model.draft_head)
    return model


def drafts_by_hand(model: HybridForCausalLM, text: list[int], count: int) -> list[int]:
    """The likeliest drafts behind a text, whose last token but one is the last row that was computed."""
    head, embedding = model.draft_head, model.model.embed_tokens.weight
    assert head is not None
    row = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1][0, -1]
    found: list[int] = []
    for _ in range(count):
        tokens = embedding[torch.tensor([text[-1], *found])]
        found.append(int(head_by_hand(head, row, tokens, model.config.vocab_size).argmax()))
    return found


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("words", [None, 9, [20, 3, 8, 11, 2, 15]])
@torch.no_grad()
def test_drafts_are_those_of_the_formula(prediction: str, words: Any) -> None:
    """Where somebody watches, and where nobody does."""
    model, ids = with_head(prediction, words), texts(5, [6])[0]
    steps: list[Step] = []
    options = {"mode": "speculative", "block_size": 5, "max_new_tokens": 20, "return_dict_in_generate": True}
    watched: Any = model.generate(torch.tensor([ids]), watchers=[steps.extend], **options)
    text = model.generate(torch.tensor([ids]), max_new_tokens=20)[0].tolist()
    assert watched.sequences[0].tolist() == text
    seen = [step for step in steps if step.window]
    assert len(seen) > 3
    for step in seen:
        end = step.position + len(step.settled)
        assert list(step.window) == drafts_by_hand(model, text[:end], 4)[: len(step.window)]
    plain: Any = model.generate(torch.tensor([ids]), **options)
    assert plain.stats.rows[0].accepted == watched.stats.rows[0].accepted


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", SPECULATION, ids=str)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("own", ["model", "adapter"])
def test_it_changes_no_text_and_rows_are_as_alone(options: dict[str, Any], prediction: str, own: str) -> None:
    model, adapter = model_for("causal", prediction), None
    if own == "model":
        model = with_head(prediction)
    else:
        adapter = DraftAdapter(model, rank=1, targets=(), head_size=12, words=11, head_rank=4)
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
    bare = with_head(prediction)
    bare.set_draft_head(None)
    without, _ = decode_all(bare if own == "model" else model, prompts, slots=3, **plain)
    differs = [done.stats.accepted for done in found] != [done.stats.accepted for done in without]
    assert differs is (options in AHEAD)  # it does something, and nothing where drafts are read off masks


@torch.no_grad()
def test_a_round_is_one_forward() -> None:
    model = with_head()
    output: Any = model.generate(
        torch.tensor([[1, 2, 3]]), mode="speculative", block_size=4, max_new_tokens=30, return_dict_in_generate=True
    )
    rounds = len(output.stats.rows[0].accepted)
    assert (output.stats.prefill, output.stats.settle, output.stats.draft) == (1, rounds, 0)
    # One row for the first token; each round reads its window, and each but the last drafts another, as prefill does.
    assert output.stats.logits == 1 + rounds * 4 + rounds * 3


def test_where_drafts_are_worth_nothing_it_is_ar() -> None:
    """A window that chooses its width stops drafting, and tries again now and then."""
    model, steps = with_head(vocab_size=400, mask_token_id=399, peaked=0.0), list[Step]()
    options = {"mode": "speculative", "max_new_tokens": 100, "eos_token_id": []}
    model.generate(torch.tensor([[1, 2, 3]]), watchers=[steps.extend], **options)
    drafts = [len(step.window) for step in steps]
    assert len(steps) > 90, "next to nothing is kept"
    assert sum(drafts[:10]) >= 4 and 3 <= sum(drafts[20:]) <= 7


@pytest.mark.one_in(2)
@pytest.mark.parametrize("words", [None, 2])
@CALLS
def test_sampled_speculation_has_the_law_of_ar(words: int | None, calls: int) -> None:
    model = of_three_words(words)
    found, stats = drawn(model, calls, mode="speculative", block_size=4, temperature=1.0)
    assert {n for row in stats.rows for n in row.accepted} == {1, 2, 3, 4}
    assert p_value(found, text_law(model, temperature=1.0)) > 1e-3


def test_laws_of_other_drafts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that verifies each draft against what the first one was drawn from."""
    model, right = of_three_words(), speculation.guessed_ahead

    def first(*args: Any) -> Any:
        return [(tokens, law[:1].expand_as(law)) for tokens, law in right(*args)]

    monkeypatch.setattr(speculation, "guessed_ahead", first)
    found, _ = drawn(model, calls=1, mode="speculative", block_size=4, temperature=1.0)
    assert p_value(found, text_law(model, temperature=1.0)) < 1e-6


@torch.no_grad()
def test_a_changed_weight_is_read_at_once() -> None:
    """Nothing of a head is kept between rounds: not even a write behind torch's back leaves an old one in force."""
    model, ids = with_head(), texts(5, [6])[0]
    options = {"mode": "speculative", "block_size": 5, "max_new_tokens": 20, "return_dict_in_generate": True}
    before: Any = model.generate(torch.tensor([ids]), **options)
    assert model.draft_head is not None
    for weight in (model.draft_head.say, model.model.embed_tokens.weight):
        weight.data.view(-1).numpy()[:] *= -1.0
    after: Any = model.generate(torch.tensor([ids]), **options)
    fresh = with_head()
    fresh.load_state_dict(model.state_dict())
    want: Any = fresh.generate(torch.tensor([ids]), **options)
    assert after.stats.rows[0].accepted == want.stats.rows[0].accepted != before.stats.rows[0].accepted
    assert torch.equal(after.sequences, want.sequences)


@torch.no_grad()
def test_short_loops_say_what_training_says() -> None:
    model = with_head()
    head = model.draft_head
    assert head is not None
    rows, tokens = torch.randn(3, 16, dtype=torch.float64), torch.tensor([[1, 5, 2], [7, 7, 0], [3, 9, 4]])
    want = head.over_text(rows, model.model.embed_tokens(tokens))
    reader, state = Reader.of(head, rows, model.model.embed_tokens.weight), None
    for i in range(3):
        logits, state = reader(tokens[:, i], state)
        assert (logits - want[:, i]).abs().max() < 1e-12


def of_three_words(words: int | None = None) -> HybridForCausalLM:
    head = {"draft_head_size": 8, "draft_words": words, "draft_rank": 4}
    model = tiny(10, dtype=torch.float32, vocab_size=4, mask_token_id=MASK, **head)
    assert model.draft_head is not None
    shaken(model.draft_head, 0.8)
    return model


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = with_head(words=9, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    again = HybridForCausalLM.from_pretrained(tmp_path / "model")
    assert again.draft_head is not None and again.draft_head.ids.tolist() == list(range(9))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    adapter = DraftAdapter(model, rank=1, targets=(), head_size=12, words=7)
    assert adapter.head is not None
    shaken(adapter.head)
    adapter.save_pretrained(tmp_path / "adapter")
    read = DraftAdapter.from_pretrained(tmp_path / "adapter", model)
    assert read.head is not None and read.head.ids.tolist() == list(range(7))
    for name, weight in adapter.head.state_dict().items():
        assert torch.equal(weight, read.head.state_dict()[name])


def test_the_words_are_where_the_weights_are_and_never_cast(tmp_path: Path) -> None:
    """Emptied weights are what transformers has while it reads a file; `meta` is another device."""
    model = with_head(words=[4, 2, 7], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert not any(name.endswith("ids") for name in [*model.state_dict(), *load_file(tmp_path / "model.safetensors")])
    again = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.device("meta"):
        unmade = HybridForCausalLM(model.config)
    changed = [model, again, unmade, copy.deepcopy(model).to(torch.float16), copy.deepcopy(model).type(torch.float16)]
    for one in [*changed, copy.deepcopy(model).to_empty(device="cpu"), unmade.to_empty(device="cpu")]:
        assert one.draft_head is not None
        assert one.draft_head.ids.dtype == torch.int64 and one.draft_head.ids.tolist() == [4, 2, 7]
    moved = copy.deepcopy(model).to("meta").draft_head
    assert moved is not None and moved.ids.is_meta


def test_a_larger_vocabulary_leaves_the_head_its_words(tmp_path: Path) -> None:
    model = with_head(dtype=torch.float32)
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert again.draft_head is not None and model.draft_head is not None
    assert torch.equal(again.draft_head.ids, model.draft_head.ids) and len(again.draft_head.ids) < 39
    with pytest.raises(ValueError, match="set_draft_head"):
        with_head(words=[1, 22], mask_token_id=3).resize_token_embeddings(22)


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
    formats()["nemotron_labs_diffusion"].write(model, tmp_path / "again")
    for name in ("theirs", "again"):
        theirs = HybridForCausalLM.from_pretrained(tmp_path / name)
        assert theirs.draft_head is None
        assert torch.equal(theirs.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"draft_head_size": 0}, "draft_head_size"),
        ({"draft_head_size": True}, "draft_head_size"),
        ({"draft_head_size": 8, "mask_token_id": None}, "mask_token_id"),
        ({"draft_head_size": 8, "clean_attention": "block"}, "causal"),
        ({"draft_words": 5}, "draft_head_size"),
        ({"draft_rank": 5}, "draft_head_size"),
        ({"draft_head_size": 8, "draft_words": 24}, "at most 23"),
        ({"draft_head_size": 8, "draft_words": []}, "draft_words"),
        ({"draft_head_size": 8, "draft_words": [3, 3]}, "different ids"),
        ({"draft_head_size": 8, "draft_words": [3, 23]}, "without the mask"),
        ({"draft_head_size": 8, "draft_words": [24]}, "different ids"),
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
