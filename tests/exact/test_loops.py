"""transformers' other loops over our model and cache, and what is shared while a model decodes."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import generators, padded, roughen, texts, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid import HybridForCausalLM, KVCache
from hybrid.adapters.draft_adapter import DraftAdapter

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
IDS = torch.tensor(texts(1, [12], vocabulary=20))
MODES = ("ar", "block", "diffusion", "speculative")


def pair(seed: int = 1) -> tuple[HybridForCausalLM, LlamaForCausalLM]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        roughen(theirs)
    ours = tiny(dtype=torch.float32, **{**SIZES, "mask_token_id": None})
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


OURS, THEIRS = pair()
ASSISTANT, OTHER = pair(2)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 2},
        {"guidance_scale": 1.5},
    ],
)  # fmt: skip
@pytest.mark.parametrize("doubled", [False, True])
def test_their_other_loops_give_their_tokens(options: dict[str, Any], doubled: bool) -> None:
    ids = torch.cat([IDS, IDS], 1) if doubled else IDS
    mine, want = (model.generate(ids, max_new_tokens=15, **options) for model in (OURS, THEIRS))
    assert torch.equal(mine, want)
    if "guidance_scale" not in options:
        assert torch.equal(mine, OURS.generate(ids, max_new_tokens=15))


@pytest.mark.parametrize("ours_helps", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_an_assistant(ours_helps: bool, same: bool) -> None:
    """Ours may be helped and may help, be it right all the time or seldom."""
    helper: Any = (OURS if same else ASSISTANT) if ours_helps else (THEIRS if same else OTHER)
    want = THEIRS.generate(IDS, max_new_tokens=15)
    for model in (OURS, THEIRS):
        assert torch.equal(model.generate(IDS, max_new_tokens=15, assistant_model=helper), want)
    with pytest.raises(ValueError, match="assistant_model: only mode='ar'"):
        tiny().generate(IDS, mode="block", assistant_model=helper)


def test_an_assistant_begins_with_an_empty_cache() -> None:
    first: Any = OURS.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"past_key_values: .*prompt_lookup_num_tokens"):
        OURS.generate(first.sequences, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3)


def test_a_hybrid_with_its_mask_is_assisted_too() -> None:
    model = tiny(3, dtype=torch.float32)
    ids = torch.tensor(texts(1, [8]))
    want = model.generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=3), want)
    assert torch.equal(model.generate(ids, max_new_tokens=12, assistant_model=tiny(4, dtype=torch.float32)), want)


@torch.no_grad()
def test_a_cache_is_cropped_and_repeated_as_theirs_is() -> None:
    ids = torch.tensor(texts(2, [9, 9], vocabulary=40))
    cache: KVCache = OURS(ids, use_cache=True).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 9
    cache.crop(-4)
    assert cache.lengths == [5, 5]
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(3)
    cache.batch_repeat_interleave(2)
    repeated = ids.repeat_interleave(2, 0)
    assert torch.equal(cache.ids[:, :5], repeated[:, :5])
    logits = OURS(repeated[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(logits, OURS(repeated).logits[:, 5:], atol=1e-5, rtol=1e-5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.ids[:, :9], ids.flip(0))
    cache.crop(-99)
    assert cache.lengths == [0, 0]
    cache.crop(-100)
    assert cache.lengths == [0, 0]


# --- Random state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": True, "temperature": 3.0}, {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3, "do_sample": True, "temperature": 3.0},
        {"typical_p": 0.5, "do_sample": True, "temperature": 3.0},
    ],
)  # fmt: skip
def test_their_loops_leave_the_global_generator_alone(options: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    found = set()
    for _ in range(6):
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        found.add(tuple(OURS.generate(IDS, max_new_tokens=8, **options)[0].tolist()))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert (len(found) > 1) == ("do_sample" in options)  # nor is it read
    if "do_sample" in options:
        seeded = [generators(1, seed)[0] for seed in (1, 1, 2)]
        one, two, other = (OURS.generate(IDS, max_new_tokens=8, generator=g, **options) for g in seeded)
        assert torch.equal(one, two) and not torch.equal(one, other)
        with pytest.raises(ValueError, match="takes one generator"):
            OURS.generate(IDS, generator=generators(1), **options)
    torch.random.set_rng_state(before)


# --- While a model decodes --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_copies_made_while_decoding(mode: str, tmp_path: Path) -> None:
    """By deepcopy, pickle and files, from a watcher and from a processor: each is the model, and decodes like it."""
    model = tiny(3, dtype=torch.float32)
    ids = torch.tensor(texts(4, [5, 5]))
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 6}
    # A processor of the caller's has drafts go from left to right.
    want = model.generate(ids, logits_processor=[lambda _ids, scores: scores], **options)
    plain, copies = model.generate(ids, **options), list[Any]()

    def take(*given: Any) -> Any:
        if len(copies) < 6:
            copies.append(copy.deepcopy(model))
            copies.append(pickle.loads(pickle.dumps(model)))
            model.save_pretrained(tmp_path)
            copies.append(HybridForCausalLM.from_pretrained(tmp_path))
        return given[-1]

    out = model.generate(ids, watchers=[take], logits_processor=[lambda _ids, scores: take(scores)], **options)
    assert torch.equal(out, want) and len(copies) >= 6
    for other in copies:
        assert torch.equal(other.generate(ids, **options), plain)
        pairs = list(zip(other.parameters(), model.parameters(), strict=True))
        assert all(torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in pairs)
        other(ids, labels=ids).loss.backward()
        assert all(x.grad is not None for x in other.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_calls_inside_calls(mode: str) -> None:
    """A processor and a watcher that ask the same model, in other modes and with an adapter."""
    model = tiny(3, dtype=torch.float32)
    adapter = DraftAdapter(model, rank=2)
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_(generator=generators(1)[0])
    ids, options = torch.tensor(texts(4, [5, 5])), {"mode": mode, "max_new_tokens": 6}
    want = model.generate(ids, logits_processor=[lambda _ids, scores: scores], **options)
    inner = {m: model.generate(ids[:1], mode=m, max_new_tokens=4) for m in MODES}
    drafted = model.generate(ids[:1], mode="block", draft_adapter=adapter, max_new_tokens=4)
    asked = 0

    def ask(*given: Any) -> Any:
        nonlocal asked
        asked += 1
        for other, tokens in inner.items():
            assert torch.equal(model.generate(ids[:1], mode=other, max_new_tokens=4), tokens)
        found = model.generate(ids[:1], mode="block", draft_adapter=adapter, max_new_tokens=4)
        assert torch.equal(found, drafted)
        return given[-1]

    out = model.generate(ids, watchers=[ask], logits_processor=[lambda _ids, scores: ask(scores)], **options)
    assert torch.equal(out, want) and asked > 4


def test_threads_with_an_adapter_in_one_of_them() -> None:
    model = tiny(3, dtype=torch.float32)
    adapter = DraftAdapter(model, rank=2)
    ids, real = padded(texts(4, [5, 3]), "left")
    calls: list[dict[str, Any]] = [{"mode": m, "max_new_tokens": 8} for m in MODES]
    calls += [{"mode": "speculative", "draft_adapter": adapter, "max_new_tokens": 8}]
    want, wrong = [model.generate(ids, real, **call) for call in calls], list[Any]()

    def run(first: int) -> None:
        for i in range(25):
            number = (first + i) % len(calls)
            try:
                if not torch.equal(model.generate(ids, real, **calls[number]), want[number]):
                    wrong.append(calls[number])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_harness_hides_no_type() -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    code = (
        "import hybrid.evals.benchmarks.harness\nfrom lm_eval.api.registry import get_model\n"
        "assert get_model('hybrid').__name__ == 'HybridLM'\nassert get_model('hf').__name__ == 'HFLM'\n"
        "assert get_model('dummy').__name__ == 'DummyLM'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_card_says_what_auto_classes_need(tmp_path: Path) -> None:
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    assert "AutoModelForCausalLM" in (card := (tmp_path / "README.md").read_text()) and "`import hybrid`" in card
    code = "import hybrid, sys, transformers as t\nt.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
