"""Sweeps: what a file of settings means, and where it is wrong."""

from pathlib import Path
from typing import Any

import pytest
from oracles import tiny

from hybrid import HybridForCausalLM
from hybrid.evals.passes.outputs import Setting
from hybrid.evals.sweep import PACKAGED, check_settings, expand, load_sweep, sampled


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return tiny(0)


def read(tmp_path: Path, text: str, model: HybridForCausalLM) -> Any:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return load_sweep(path, model)


def test_lists_are_products_in_order(tmp_path: Path, model: HybridForCausalLM) -> None:
    sweep = read(tmp_path, """
settings:
  - mode: ar
  - mode: speculative
    block_size: [4, 8]
    fused: [false, true]
  - mode: block
    block_size: 3
    reveal: entropy_bound
    entropy_bound: [0.1, 0.5]
    name: "blocks, entropy {entropy_bound}"
  - mode: diffusion
    confidence_threshold: 0.9
    eos_token_id: [[1, 2]]
options:
  repetition_penalty: 1.1
""", model)  # fmt: skip
    assert sweep.settings[0] == Setting(name="one at a time", mode="ar")
    assert [(s.mode, s.options) for s in sweep.settings[1:5]] == [
        ("speculative", {"block_size": k, "fused": fused}) for k in (4, 8) for fused in (False, True)
    ]
    assert [s.name for s in sweep.settings] == [
        "one at a time", "window 4", "window 4, fused", "window 8", "window 8, fused", "blocks, entropy 0.1",
        "blocks, entropy 0.5", "threshold 0.9, eos token id [1, 2]",
    ]  # fmt: skip
    assert sweep.settings[5].options == {"block_size": 3, "reveal": "entropy_bound", "entropy_bound": 0.1}
    assert sweep.settings[7].options["eos_token_id"] == [1, 2]
    assert sweep.options == {"repetition_penalty": 1.1}
    assert sweep.skipped == ()


def test_names_say_what_differs() -> None:
    def names(**entry: Any) -> list[str]:
        return [setting.name for setting in expand(entry)]

    assert names(mode="block", block_size=8, reveal=["leftmost", "margin"], steps_per_block=2) == [
        "block 8, leftmost, steps per block 2", "block 8, margin, steps per block 2"]  # fmt: skip
    assert names(mode="block", do_sample=[True, False]) == ["do sample", "no do sample"]
    assert names(mode="speculative") == ["window as accepted"]
    assert names(mode="block", block_size=[4, None]) == ["block 4", "as it is"]


@pytest.mark.parametrize("name", ["default", "orders"])
@pytest.mark.parametrize(("fields", "modes"), [
    ({}, ["ar", "block", "diffusion", "speculative"]), ({"clean_attention": "full"}, ["block", "diffusion"]),
    ({"clean_attention": "block", "block_size": 4}, ["ar", "block", "diffusion", "speculative"]),
    ({"mask_token_id": None}, ["ar"]),
])  # fmt: skip
def test_packaged_sweeps_suit_every_model(name: str, fields: dict[str, Any], modes: list[str]) -> None:
    model = tiny(0, **fields)
    sweep = load_sweep(name, model)
    assert sorted({setting.mode for setting in sweep.settings}) == modes
    check_settings(model, sweep.settings, 4, 8, sweep.options)
    assert len({setting.name for setting in sweep.settings}) == len(sweep.settings)
    assert bool(sweep.skipped) == (len(modes) < 4)


@pytest.mark.parametrize(("text", "message"), [
    ("", "line 1: a sweep has a list `settings`"),
    ("settings: []", "line 1: a sweep has a list"),
    ("- mode: ar", "line 1: a sweep has a list"),
    ("settings:\n  - mode: [ar\n", "line 3 is not YAML"),
    ("settings: [{mode: ar}]\ncolour: red\n", "no field 'colour'"),
    ("settings: [{mode: ar}]\noptions: 3\n", "options must be a mapping"),
    ("settings: [{mode: ar}]\noptions:\n  max_new_tokens: 3\n", "line 3: options.max_new_tokens"),
    ("settings: [{mode: ar}]\noptions:\n  mode: ar\n", "options.mode: this is set by each entry"),
    ("settings:\n  - mode: ar\n  - quick\n", r"settings\[1\] is 'quick'"),
    ("settings:\n  - mode: ar\n\n  - mode: telepathy\n", r"line 4: settings\[1\].mode is 'telepathy'; use one of ar"),
    ("settings:\n  - block_size: 3\n", r"line 2: settings\[0\].mode is None"),
    ("settings:\n  - mode: ar\n    generator: 3\n", r"line 2: settings\[0\].generator"),
    ("settings:\n  - mode: block\n    blocksize: 3\n", r"line 2: .*'blocksize'. Did you mean block_size"),
    ("settings:\n  - mode: block\n    block_length: 3\n", r"line 2: .*block_length is another.*block_size"),
    ("settings:\n  - mode: ar\n    block_size: 3\n", r"line 2: settings\[0\]: block_size is the window"),
    ("settings:\n  - mode: block\n    confidence_threshold: 7\n", r"line 2: settings\[0\]: confidence_threshold"),
    ("settings:\n  - mode: block\n    confidence_threshold: high\n", r"line 2: settings\[0\]: "),
    ("settings:\n  - mode: block\n    block_size: []\n", r"line 2: settings\[0\]: block_size is an empty list"),
    ("settings:\n  - mode: ar\n    name: '{colour}'\n", r"line 2: settings\[0\]: name is '{colour}'"),
    ("settings:\n  - mode: ar\n  - mode: ar\n", r"line 3: settings\[1\]: two settings are called 'one at a time'"),
    ("settings:\n  - mode: ar\n    num_beams: 3\n", r"line 2: settings\[0\]: num_beams: only transformers"),
    ("settings:\n  - mode: block\n    block_size: 3\n    block_size: 4\n", "line 4 is not YAML .block_size stands"),
    ("settings: [!!python/object/apply:os.getcwd []]", "is not YAML"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(
    text: str, message: str, tmp_path: Path, model: HybridForCausalLM
) -> None:
    with pytest.raises(ValueError, match=rf"sweep\.yaml.*{message}"):
        read(tmp_path, text, model)


def test_a_mode_that_the_model_lacks_is_an_error_in_a_file_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "settings:\n  - mode: block\n  - mode: ar\n"
    with pytest.raises(ValueError, match=r"line 3: settings\[1\]: mode='ar' needs clean_attention='causal'"):
        read(tmp_path, text, tiny(0, clean_attention="full"))
    (tmp_path / "ar.yaml").write_text("settings:\n  - mode: ar\n")
    monkeypatch.setitem(PACKAGED, "ar", tmp_path / "ar.yaml")
    with pytest.raises(ValueError, match="no setting that this model can run"):
        load_sweep("ar", tiny(0, clean_attention="full"))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_sweep(path, tiny(0))


def test_sampling_is_seen_also_where_the_checkpoint_asks_for_it() -> None:
    model = tiny(0)
    assert not sampled(model, {})
    assert sampled(model, {"do_sample": True})
    assert not sampled(model, {"do_sample": True, "temperature": 0.0})
    model.generation_config.do_sample = True
    assert sampled(model, {})
    assert not sampled(model, {"do_sample": False})


def test_what_the_measurement_sets_is_refused(model: HybridForCausalLM) -> None:
    setting = Setting(name="one", mode="ar", options={"max_new_tokens": 3})
    with pytest.raises(ValueError, match="ar, one: max_new_tokens: the measurement sets this"):
        check_settings(model, [setting], longest=3, max_new_tokens=3, options={})
