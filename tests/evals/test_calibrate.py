"""`mode="auto"` takes what was measured to be fastest, of what is allowed, and says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import texts, tiny

from hybrid.evals.timing.calibrate import calibrate, own_text, ways
from hybrid.sampling.options.auto import Timing, choose, keep, place_of

SPEEDS = [
    Timing(options={"mode": "ar"}, batch_size=1, tokens_per_second=100),
    Timing(options={"mode": "speculative", "block_size": 3, "fused": True}, batch_size=1, tokens_per_second=150),
    Timing(options={"mode": "block", "block_size": 4}, batch_size=1, tokens_per_second=300),
    Timing(options={"mode": "ar"}, batch_size=8, tokens_per_second=500),
    Timing(options={"mode": "speculative", "block_size": 3, "fused": True}, batch_size=8, tokens_per_second=400),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    return tmp_path


def decoded(model: Any, rows: int = 1, **options: Any) -> Any:
    ids = torch.tensor(texts(0, [4] * rows))
    return model.generate(ids, mode="auto", max_new_tokens=8, return_dict_in_generate=True, **options)


def test_it_never_takes_what_was_slower_or_is_not_allowed() -> None:
    model = tiny()
    keep(model, SPEEDS)
    for rows, allow, mode in ((1, [], "speculative"), (2, [], "speculative"), (1, ["block"], "block"), (7, [], "ar")):
        out = decoded(model, rows, auto_allow=allow)
        assert out.stats.mode == mode and out.stats.choice.startswith(mode)
        ids = torch.tensor(texts(0, [4] * rows))
        if mode != "block":
            assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=8))
    assert "150 tokens/s" in decoded(model).stats.choice and "ar 100" in decoded(model).stats.choice


def test_left_to_right_is_another_text_for_a_model_of_blocks() -> None:
    model = tiny(clean_attention="block")
    keep(model, SPEEDS)
    assert decoded(model).stats.mode == "block"


def test_a_calibration_belongs_to_one_checkpoint_and_machine() -> None:
    keep(tiny(), SPEEDS)
    assert "not calibrated" in decoded(tiny(1)).stats.choice and decoded(tiny(1)).stats.mode == "ar"
    assert decoded(tiny(clean_attention="full")).stats.mode == "block"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert decoded(tiny()).stats.mode == "ar"
    finally:
        torch.set_num_threads(threads)


def test_a_damaged_calibration_is_named() -> None:
    model = tiny()
    place_of(model).parent.mkdir(parents=True)
    place_of(model).write_text("{")
    with pytest.raises(ValueError, match=place_of(model).name):
        decoded(model)


@pytest.mark.parametrize("options",
    [{"block_size": 3}, {"fused": True}, {"auto_allow": "block"}, {"auto_allow": ["x"]}],
)
def test_what_auto_chooses_is_not_given(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        decoded(tiny(), **options)
    with pytest.raises(ValueError, match="auto_allow"):
        tiny().generate(torch.tensor([[1]]), auto_allow=["block"])


def test_rows_that_are_returned_for_one_prompt_count_as_rows() -> None:
    model = tiny()
    keep(model, [Timing(options={"mode": "ar"}, batch_size=1, tokens_per_second=9),
                 Timing(options={"mode": "speculative"}, batch_size=4, tokens_per_second=9)])  # fmt: skip
    options: dict[str, Any] = {"mode": "auto", "max_new_tokens": 2, "return_dict_in_generate": True}
    ids = torch.tensor([[1, 2]])
    assert model.generate(ids, **options).stats.mode == "ar"
    assert model.generate(ids, num_return_sequences=4, **options).stats.mode == "speculative"


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
def test_every_way_is_measured_at_every_batch_size(clean: str) -> None:
    model = tiny(clean_attention=clean)
    prompts = own_text(model, 2, 5)
    assert prompts.shape == (2, 5)
    found = calibrate(model, prompts, batch_sizes=(1, 2), windows=(2, 4), new_tokens=6, rounds=1)
    assert len(found) == 2 * len(ways(model, (2, 4))) and all(t.tokens_per_second > 0 for t in found)
    assert {t.options["mode"] for t in found} == (
        {"ar", "speculative", "block", "diffusion"} if clean == "causal" else {"block", "diffusion"}
    )
    keep(model, found)
    fastest = max((t for t in found if t.batch_size == 1), key=lambda t: t.tokens_per_second)
    assert choose(model, 1, ["block", "diffusion"])[0] == fastest.options
    with pytest.raises(ValueError, match="batch_sizes"):
        calibrate(model, prompts, batch_sizes=(3,))


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts_of_its_own(length: int) -> None:
    assert own_text(tiny(1), 3, length).shape == (3, length)


def test_what_only_their_loop_has_is_left_to_right() -> None:
    model = tiny()
    keep(model, SPEEDS)
    ids = torch.tensor(texts(0, [4]))
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids, mode="auto", **options), model.generate(ids, mode="ar", **options))


def test_timings_that_cannot_be_used_choose_nothing() -> None:
    """Of a mode that the model does not have, or that changes its text."""
    model = tiny()
    keep(model, [timing for timing in SPEEDS if timing.options["mode"] == "block"])
    assert decoded(model).stats.choice == "ar: no usable timing; `hybrid bench calibrate MODEL` measures anew"
