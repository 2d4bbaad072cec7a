"""Kernels are chosen by measuring, and say what the modules say: for every number of rows, and whatever is done to the
weights in between."""

import copy
import gc
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from oracles import places, texts, tiny
from torch import Tensor, nn

from hybrid import HybridForCausalLM, Layout
from hybrid.evals.timing.bench import forward_costs
from hybrid.fast import costs, kernels, packs
from hybrid.fast.costs import ROWS, Costs
from hybrid.fast.flat import Flat
from hybrid.fast.kernels import Map
from hybrid.sampling import Session

needs_ops = pytest.mark.skipif(not packs.available(), reason="torch has no packed products here")
IDS = torch.tensor(texts(0, [40]))


def known(**product: float) -> Callable[..., Costs]:
    """Costs that nobody measured, the same for all weights."""
    found = Costs({kernel: [seconds] * len(ROWS) for kernel, seconds in product.items()}, pack=1e-9)
    return lambda *shape: found


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """Every weight is packed as soon as it is needed; the shapes of those that were."""
    made: list[torch.Size] = []

    def pack(weight: Tensor, real: Callable[[Tensor], Tensor] = packs.pack) -> Tensor:
        made.append(weight.shape)
        return real(weight)

    monkeypatch.setattr(kernels, "LARGE", 0)
    monkeypatch.setattr(kernels, "WORTH", 0)
    monkeypatch.setattr(kernels, "costs", known(plain=3.0, turned=2.0, packed=1.0))
    monkeypatch.setattr(packs, "pack", pack)
    yield made


def said(model: HybridForCausalLM, rows: int = 8) -> Tensor:
    """Logits of the fast path."""
    with torch.no_grad():
        flat = Flat.of(model, 40)
        assert flat is not None
        return flat.head(flat(IDS[:, :rows], Layout.causal(places(rows)), None)[0])


def far(model: HybridForCausalLM, rows: int = 8) -> float:
    """How far the fast path is from the modules, in units of the largest logit."""
    with torch.no_grad():
        want = model(IDS[:, :rows]).logits[0]
    return float((said(model, rows) - want).abs().max() / want.abs().max())


def sized(**fields: Any) -> HybridForCausalLM:
    given = {"dtype": torch.float32, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
    return tiny(**{**given, **fields})


# --- The same numbers ---------------------------------------------------------------------------------------


@needs_ops
@pytest.mark.parametrize("kernel", ["plain", "turned", "packed"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("fields", [{"attention_bias": True}, {"qk_norm": True, "tie_word_embeddings": True}], ids=str)
def test_every_kernel_says_what_the_modules_say(
    packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, close: float,
    fields: dict[str, Any],
) -> None:  # fmt: skip
    seconds = {"plain": 3.0, "turned": 3.0, "packed": 3.0} | {kernel: 1.0}
    monkeypatch.setattr(kernels, "costs", known(**seconds))
    model = sized(dtype=dtype, **fields)
    assert all(far(model, rows) < close for rows in range(1, 41))
    assert bool(packing) == (kernel == "packed")


def test_a_map_takes_what_was_measured_for_its_rows(packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows between two that were measured go with the larger one, and above the last it is torch's turn."""
    used: list[int] = []
    monkeypatch.setattr(kernels, "turned", lambda x, w: used.append(len(x)) or costs.turned(x, w))
    product = {"plain": [2.0] * len(ROWS), "turned": [9.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0]}
    monkeypatch.setattr(kernels, "costs", lambda *shape: Costs(product, 1.0))
    linear = nn.Linear(8, 8, bias=False)
    for rows in range(1, 80):
        Map([linear])(torch.ones(rows, 8))
    assert used == [2, 5, 6, 7, 8, *range(33, 65)]


@needs_ops
def test_a_copy_is_made_once_it_was_missed_for_long_enough(
    packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made or not before: the same call is done in the same way, so that it gives the same numbers."""
    found = Costs({kernel: [s] * len(ROWS) for kernel, s in (("plain", 3.0), ("turned", 3.0), ("packed", 1.0))}, 22.0)
    monkeypatch.setattr(kernels, "costs", lambda *shape: found)
    linear = nn.Linear(8, 8, bias=False)
    for already in (0, 1):
        some = Map([linear])
        for call in (1, 2, 3, 4):  # two seconds are lost by each, and a quarter of 22 is enough
            some(torch.ones(4, 8))
            assert (some.packed is not None) == (call >= 3)
        assert len(packing) == 1, already


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_small_and_wide_models_and_those_who_ask_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*shape: object) -> Costs:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(kernels, "costs", never)
    said(sized())  # few bytes
    monkeypatch.setattr(kernels, "LARGE", 0)
    said(sized())  # many, but all of them in small weights
    monkeypatch.setattr(kernels, "WORTH", 0)
    said(sized(dtype=torch.float64))
    with torch.backends.mkldnn.flags(enabled=False):
        said(sized())
    with monkeypatch.context() as without:
        without.setattr(packs, "available", lambda: False)
        without.setattr(kernels, "available", lambda: False)
        want = said(sized())
    monkeypatch.setenv("HYBRID_KERNELS", "plain")
    assert torch.equal(said(sized()), want)
    monkeypatch.setenv("HYBRID_KERNELS", "fast")
    with pytest.raises(ValueError, match="HYBRID_KERNELS is 'fast'"):
        said(sized())


@needs_ops
def test_both_kinds_of_forward_are_timed(packing: list[torch.Size]) -> None:
    model = sized()
    costs = forward_costs(model, past=8, rounds=1, slots=(1, 3))
    assert len(packing) == 9 and set(costs) == {1, 3}
    assert all(plain > 0 and chosen > 0 and plain != chosen for plain, chosen in costs.values())


@needs_ops
@pytest.mark.parametrize("do_sample", [False, True])
def test_modes_keep_their_laws_with_kernels_that_differ_by_rows(
    packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch, do_sample: bool
) -> None:
    """A row alone is the row in a batch, and speculation says what `ar` says."""
    by_rows = Costs({"plain": [3.0, 3, 3, 1, 3, 3, 3], "turned": [1.0, 1, 3, 3, 3, 3, 3],
                     "packed": [2.0, 2, 1, 2, 1, 1, 1]}, 1e-9)  # fmt: skip
    monkeypatch.setattr(kernels, "costs", lambda *shape: by_rows)
    model, prompts = sized(), [row[:8] for row in texts(1, [8, 8, 8])]
    for options in ({"mode": "ar"}, {"mode": "speculative"}, {"mode": "block"}, {"mode": "diffusion"}):
        def run(rows: list[list[int]], seeds: list[int], options: dict[str, str] = options) -> list[list[int]]:
            sources = [torch.Generator().manual_seed(seed) for seed in seeds]
            given = {"max_new_tokens": 16, "do_sample": do_sample, "eos_token_id": [], **options}
            return model.generate(torch.tensor(rows), generator=sources, **given).tolist()  # type: ignore[no-any-return]

        together = run(prompts, [0, 1, 2])
        assert [run([prompt], [seed])[0] for seed, prompt in enumerate(prompts)] == together, options
        if options["mode"] == "speculative" and not do_sample:
            assert together == run(prompts, [0, 1, 2], {"mode": "ar"})
    assert packing


# --- Weights that change ------------------------------------------------------------------------------------


def optimizer_step(model: HybridForCausalLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


def loaded(model: HybridForCausalLM) -> None:
    model.load_state_dict(sized(seed=1).state_dict())


def assigned(model: HybridForCausalLM) -> None:
    model.load_state_dict(sized(seed=1).state_dict(), assign=True)


def written_in_place(model: HybridForCausalLM) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def written_through_data(model: HybridForCausalLM) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def written_in_inference_mode(model: HybridForCausalLM) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(1.5)


def written_by_numpy(model: HybridForCausalLM) -> None:
    for p in model.parameters():
        p.detach().numpy()[:] *= 1.5


def given_other_data(model: HybridForCausalLM) -> None:
    for p, other in zip(model.parameters(), sized(seed=1).parameters(), strict=True):
        p.data = other.data


def written_through_a_block(model: HybridForCausalLM) -> None:
    """The parameters of a layer's maps are views of one block."""
    for layer in model.model.layers:
        maps = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        block = torch.cat([m.weight.data for m in maps])
        for m, part in zip(maps, block.split([len(m.weight) for m in maps]), strict=True):
            m.weight.data = part
        said(model)
        block.mul_(1.5)


def one_weight(model: HybridForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 4


def two_signs(model: HybridForCausalLM) -> None:
    """In the upper halves of words: they cancel out in a sum of words."""
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[[2, 4], 5] = 3.0
    said(model)
    weight[[2, 4], 5] *= -1


def units_in_another_order(model: HybridForCausalLM) -> None:
    """Each row has the same words as before."""
    weight = model.model.layers[1].mlp.down_proj.weight.data[:, 4:-4]
    weight[:] = weight.reshape(len(weight), -1, 4).flip(1).flatten(1)


def rows_in_another_order(model: HybridForCausalLM) -> None:
    """Each column has the same words as before."""
    weight = model.lm_head.weight.data[1:-1]
    weight[:] = weight.flip(0)


def merged_by_peft(model: HybridForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
    peft.get_peft_model(model, config).merge_and_unload()


def stepped_by_ddp(model: HybridForCausalLM) -> None:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.05)
        wrapped(IDS, labels=IDS).loss.backward()
        said(model)  # DDP holds on to what it saw, decoding in between or not
        optimizer.step()
    finally:
        # A thread of gloo lets go of the last sum under Python's lock, which ending the group holds while it waits for
        # that thread: whoever comes too soon waits for ever.
        time.sleep(0.2)
        distributed.destroy_process_group()


def moved(model: HybridForCausalLM) -> None:
    model.to(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.to(torch.float32)


def replaced(model: HybridForCausalLM) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight.data.mul_(2)


CHANGES = [
    optimizer_step, loaded, assigned, written_in_place, written_through_data, written_in_inference_mode,
    written_by_numpy, given_other_data, written_through_a_block, one_weight, two_signs, units_in_another_order,
    rows_in_another_order, merged_by_peft, stepped_by_ddp, moved,
]  # fmt: skip


@needs_ops
@pytest.mark.parametrize("change", [*CHANGES, replaced])
def test_a_weight_that_changes_is_seen(packing: list[torch.Size], change: Callable[[HybridForCausalLM], None]) -> None:
    model = sized()
    before = said(model)
    change(model)
    assert far(model) < 1e-5
    assert (said(model) - before).abs().max() > 1e-3


@needs_ops
@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_copy_would_be_noticed(
    packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch, change: Callable[[HybridForCausalLM], None]
) -> None:
    """What the test above is worth: without the comparison, all of them fail."""
    monkeypatch.setattr(packs, "checksum", lambda weight: ())
    model = sized()
    said(model)
    change(model)
    assert far(model) > 1e-3


@pytest.mark.parametrize("shape", [(3, 2), (7, 9), (40, 65), (64, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_is_of_every_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    was, raw = packs.checksum(weight), weight.view(torch.uint8).view(-1)
    assert packs.checksum(weight.clone()) == was
    for at in {0, 1, 2, 3, 4, 5, len(raw) // 2, *range(len(raw) - 9, len(raw))}:
        for bit in (1, 128):
            raw[at] ^= bit
            assert packs.checksum(weight) != was, (at, bit)
            raw[at] ^= bit
    assert packs.checksum(weight) == was != packs.checksum(weight.view(-1))


def test_signs_count_in_a_checksum() -> None:
    """A sum of words alone does not see that the signs of two of their upper halves have changed."""
    weight = torch.ones(64, 64)
    was = packs.checksum(weight)
    for rows in ([2, 4], [0, 1, 5, 63], slice(None)):
        weight[rows, 5] *= -1
        assert packs.checksum(weight) != was
        weight[rows, 5] *= -1


@needs_ops
def test_a_session_that_had_nothing_to_do_sees_new_weights(packing: list[torch.Size]) -> None:
    def text(session: Session) -> list[int]:
        session.admit(IDS[0, :8])
        while not (done := session.step()):
            pass
        return list(done[0].tokens)

    model = sized()
    session = Session(model, slots=2, max_new_tokens=8)
    before = text(session)
    loaded(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    after = text(session)
    assert after == text(Session(model, slots=2, max_new_tokens=8)) != before


@needs_ops
@pytest.mark.parametrize("change", [loaded, written_in_place, written_in_inference_mode, given_other_data])
def test_a_session_under_way_sees_new_weights(
    packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch, change: Callable[[HybridForCausalLM], None]
) -> None:
    """From the next forward on, as the modules do."""

    def text() -> list[int]:
        model = sized()
        session = Session(model, slots=2, max_new_tokens=24)
        session.admit(IDS[0, :8])
        for _ in range(5):
            session.step()
        change(model)
        while not (done := session.step()):
            pass
        return list(done[0].tokens)

    found = text()
    with monkeypatch.context() as modules:
        modules.setattr(Flat, "of", lambda *given: None)
        assert text() == found
    monkeypatch.setattr(Flat, "outdated", False)
    assert text() != found, "or the test is worth nothing"


# --- Copies and the model -----------------------------------------------------------------------------------


@needs_ops
def test_copies_are_made_once_a_model_and_go_with_it(packing: list[torch.Size]) -> None:
    gc.collect()
    model, kept = sized(), len(packs._KEPT)
    first = said(model)
    assert len(packing) == 2 * 4 + 1
    assert torch.equal(said(model), first) and len(packing) == 9
    assert len(packs._KEPT) == kept + 9
    del model
    gc.collect()
    assert len(packs._KEPT) == kept


@needs_ops
def test_threads_share_copies(packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    model = sized()
    want = said(sized())
    packing.clear()
    pack = packs.pack
    monkeypatch.setattr(packs, "pack", lambda weight: time.sleep(0.01) or pack(weight))  # the others come meanwhile
    found: list[Tensor] = []
    begin = threading.Barrier(4)

    def run() -> None:
        begin.wait()
        found.append(said(model))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(logits, want) for logits in found)
    assert len(packing) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_leaves_no_trace_on_a_model(packing: list[torch.Size], dtype: torch.dtype, tmp_path: Path) -> None:
    def state(model: nn.Module) -> list[Any]:
        return [(name, sorted(vars(m)), [(n, p.data_ptr(), p.untyped_storage().nbytes(), p._version)
                for n, p in m.named_parameters(recurse=False)]) for name, m in model.named_modules()]  # fmt: skip

    model = sized(dtype=dtype)
    before, size = state(model), len(pickle.dumps(model))
    text = model.generate(IDS[:, :8], max_new_tokens=8)
    assert state(model) == before and len(pickle.dumps(model)) == size
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))  # refuses parameters that share a storage
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(IDS[:, :8], max_new_tokens=8), text)
        written_through_data(twin)
        assert far(twin) < 1e-5
    assert torch.equal(model.generate(IDS[:, :8], max_new_tokens=8), text)
    clean = pytest.importorskip("accelerate.utils").clean_state_dict_for_safetensors  # it drops what is shared
    assert set(clean(model.state_dict())) == set(model.state_dict())


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@needs_ops
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")
def test_a_copy_is_as_large_as_its_weight(packing: list[torch.Size]) -> None:
    """And the last one is gone before the next is made."""
    maps = [nn.Linear(2048, 4096, bias=False), nn.Linear(2048, 2048, bias=False)]
    size = sum(m.weight.nbytes for m in maps)
    before = resident()
    for scale in (1.0, 2.0, 3.0):
        for m in maps:
            m.weight.data.fill_(scale)
        chosen = Map(maps)
        assert float(chosen(torch.ones(1, 2048))[0, 0]) == 2048 * scale
        assert 0.9 * size < resident() - before < 1.15 * size + (8 << 20)
        del chosen


@needs_ops
def test_no_copy_is_made_where_memory_is_short(packing: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "SPARE", 1.0)
    assert far(sized()) < 1e-5 and not packing


# --- Measuring ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and little patience."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "COLD", 1 << 18)
    monkeypatch.setattr(costs, "PATIENCE", 60.0)
    monkeypatch.setattr(costs, "ALIKE", float("inf"))
    monkeypatch.setattr(costs, "_asked", -costs.AGAIN)
    monkeypatch.setattr(costs, "_KNOWN", {})
    return tmp_path


def measured(out: int, size: int, dtype: torch.dtype = torch.float32) -> Costs:
    found = costs.costs(out, size, dtype)
    assert found is not None
    return found


@needs_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_are_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    found = measured(2048, 256, dtype)
    assert {"plain", "turned"} <= set(found.product) and all(s > 0 for many in found.product.values() for s in many)
    other = measured(128, 64, dtype)
    (file,) = cache.rglob("*.json")
    assert set(json.loads(file.read_text())) == {f"2048x256 {dtype}", f"128x64 {dtype}"}
    assert not list(cache.rglob("*.part"))
    costs._KNOWN.clear()  # as a new process
    monkeypatch.setattr(costs, "_measure", lambda *shape: pytest.fail("it is known"))
    assert vars(measured(2048, 256, dtype)) == vars(found) and vars(measured(128, 64, dtype)) == vars(other)


def test_large_weights_are_measured_by_a_part(cache: Path) -> None:
    small, large = measured(2048, 256), measured(20480, 256)
    assert large.product["plain"] == [pytest.approx(10 * s) for s in small.product["plain"]]
    assert large.pack == pytest.approx(10 * small.pack)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b'{"256x64 torch.float32": 3}', b'{"256x64 torch.float32": {}}',
     b'{"256x64 torch.float32": {"product": {"plain": [1], "turned": [1]}, "pack": 1}}',
     b'{"256x64 torch.float32": {"product": {"plain": [1,1,1,1,1,1,-1], "turned": [1,1,1,1,1,1,1]}, "pack": 1}}',
     b'{"256x64 torch.float32": {"product": {"plain": [1,1,1,1,1,1,1], "turned": [1,1,1,1,1,1,1]}, "pack": "a"}}',
     b'{"256x64 torch.float32": {"product": {"packed": [1,1,1,1,1,1,1]}, "pack": 1}}'],
)  # fmt: skip
def test_a_damaged_cache_is_measured_anew(cache: Path, content: bytes) -> None:
    measured(256, 64)
    (file,) = cache.rglob("*.json")
    file.write_bytes(content)
    costs._KNOWN.clear()  # as a new process
    assert all(s > 0 for s in measured(256, 64).product["plain"])
    assert list(json.loads(file.read_text())) == ["256x64 torch.float32"]


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "file"))
    assert measured(256, 64) is measured(256, 64)
    monkeypatch.setattr(costs, "_place", lambda *machine: None)
    assert measured(256, 64).product["plain"]


@pytest.mark.parametrize(("name", "value"), [("PATIENCE", 0.0), ("ALIKE", 0.9)])
def test_a_busy_machine_is_left_to_torch_and_asked_again_later(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    """No product can be timed, or times do not agree; and asking takes time itself."""
    with monkeypatch.context() as busy:
        busy.setattr(costs, "PATIENCE", 0.1)
        busy.setattr(costs, name, value)
        assert costs.costs(256, 64, torch.float32) is None
    assert costs.costs(256, 64, torch.float32) is None and costs.costs(128, 64, torch.float32) is None
    assert not list(cache.rglob("*.json"))
    monkeypatch.setattr(kernels, "WORTH", 0)
    linear = nn.Linear(64, 256, bias=False)
    assert torch.equal(Map([linear])(torch.ones(2, 64)), torch.mm(torch.ones(2, 64), linear.weight.t()))
    monkeypatch.setattr(costs, "AGAIN", 0.0)
    assert measured(256, 64).product["plain"] and list(cache.rglob("*.json"))


def test_a_processor_that_cannot_is_not_asked_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed products of some number formats are not there on all processors."""

    def broken(*given: object) -> Tensor:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(costs, "product", broken)
    assert set(measured(256, 64).product) == {"plain", "turned"}
    monkeypatch.setattr(kernels, "WORTH", 0)
    linear = nn.Linear(64, 256, bias=False)
    out = Map([linear])(torch.ones(2, 64))
    assert (out - linear(torch.ones(2, 64))).abs().max() < 1e-5
