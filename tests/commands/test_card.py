"""The card of every folder that is saved, and `hybrid card`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import tiny
from transformers import AutoModelForCausalLM

from hybrid import HybridForCausalLM
from hybrid.checkpoints.card import MARK, NAME, STOCK
from hybrid.checkpoints.tensorfile import read_header
from hybrid.commands import main
from hybrid.evals.results import SCHEMA

OWN = "# Mine\n\nDo not touch.\n"


def row(mode: str, setting: str, quality: float, speed: float) -> dict[str, Any]:
    return {
        "mode": mode, "setting": setting, "settings": {}, "quality": quality, "quality_standard_error": 0.01,
        "exact": 0.5, "distinct_2": 0.9, "agreement": 1.0, "tokens_per_forward": speed, "tokens_per_draft": None,
        "acceptance": None, "tokens_per_second": 100.0 * speed, "time_to_first_token": 0.1,
        "forwards": {"prefill": 1, "settle": 8, "draft": 0}, "lossless": False, "prompts": 4, "tokens_out": 32,
    }  # fmt: skip


def results(path: Path) -> Path:
    act = {
        "name": "a", "title": "Small on puzzles",
        "rows": [row("ar", "greedy", 0.5, 1.0), row("block", "a|b", 0.25, 3.5)],
        "samples": [], "likelihood": [], "model": {},
        "quality": {"name": "solved", "unit": "share", "higher_is_better": True, "description": "grids"},
    }  # fmt: skip
    document: dict[str, Any] = {"schema": SCHEMA, "created": "2026-01-01T00:00:00+00:00", "hybrid": "0"}
    document |= {"environment": {}, "acts": [act]}
    path.write_text(json.dumps(document))
    return path


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / NAME).read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny(3, dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_saved_has_a_card_that_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, body = parts(folder)
    assert head == {
        "library_name": "hybrid-lm", "pipeline_tag": "text-generation",
        "tags": ["hybrid", "diffusion-language-model", "speculative-decoding"],
    }  # fmt: skip
    modes = "`ar`, `diffusion`, `speculative` and `block`"
    for said in (modes, "| layers | 2 of 16, 2 heads |", "| mask token | 23 |"):
        assert said in body
    from hybrid.training.text.tokenizing import train_bpe

    tokenizer = train_bpe(["Once upon a time"], 262)
    wide = tiny(3, dtype=torch.float32, vocab_size=len(tokenizer), mask_token_id=0)
    wide.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code = parts(folder)[1].split("```python\n")[1].split("```")[0]
    exec(code.replace("PATH OR NAME OF THIS REPOSITORY", str(folder)), {})


def test_the_table_and_the_license_go_in(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = results(tmp_path / "results.json")
    main(["card", str(folder), "--results", str(file), "--license", "apache-2.0", "--base-model", "owner/base"])
    assert capsys.readouterr().out == f"{folder / NAME}\n"
    head, body = parts(folder)
    assert (head["license"], head["base_model"]) == ("apache-2.0", "owner/base")
    lines = body[body.index("### Small on puzzles") :].splitlines()
    assert lines[2].startswith("|  | mode | setting | solved |")
    [ar, block] = lines[4:6]
    assert ar.startswith("| ● | ar | greedy | 50.0% ± 1.0 |") and "| 1.00 |" in ar
    assert block.startswith("| ● | block | a\\|b | 25.0% ± 1.0 |") and "| 3.50 |" in block and "| 350 |" in block


def test_it_goes_along_while_the_weights_are_the_same(folder: Path, tmp_path: Path) -> None:
    main(["card", str(folder), "--results", str(results(tmp_path / "results.json"))])
    model = HybridForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / NAME).read_bytes() == (folder / NAME).read_bytes()
    model.save_pretrained(folder)
    assert "Small on puzzles" in (folder / NAME).read_text()
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "changed")
    assert "Small on puzzles" not in (tmp_path / "changed" / NAME).read_text()
    model.save_pretrained(folder)
    assert "Small on puzzles" not in (folder / NAME).read_text(), "the figures were of other weights"


def test_a_card_of_ones_own_stays(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / NAME).write_text(OWN)
    model = HybridForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    assert (folder / NAME).read_text() == OWN
    with pytest.raises(SystemExit):
        main(["card", str(folder)])
    assert "somebody's own" in capsys.readouterr().err and (folder / NAME).read_text() == OWN
    (folder / NAME).write_text(MARK)
    main(["card", str(folder)])
    assert (folder / NAME).read_text() != MARK


class Hub:
    """The hub, as far as an upload asks for it: what would be uploaded is kept."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, operations: Any, **_: Any) -> str:
        self.files = {x.path_in_repo: Path(x.path_or_fileobj).read_bytes() for x in operations}
        return "done"


@pytest.mark.parametrize("theirs", [STOCK, OWN], ids=["none there", "one there"])
def test_an_upload_has_checksums_and_the_card(
    theirs: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two calls is used. No network: the hub's client is replaced, and all before it is real."""
    from huggingface_hub import ModelCard

    hub = Hub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: ModelCard(theirs))
    model = HybridForCausalLM.from_pretrained(folder)
    for upload in (
        lambda: model.push_to_hub("owner/name"),
        lambda: model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="owner/name"),
    ):
        upload()
        (tmp_path / "up.safetensors").write_bytes(hub.files["model.safetensors"])
        assert read_header(tmp_path / "up.safetensors").checksums
        assert (MARK in hub.files[NAME].decode()) == (theirs == STOCK)
        assert (OWN.strip() in hub.files[NAME].decode()) == (theirs == OWN)


@pytest.mark.parametrize("shards", ["1GB", "6KB"])
def test_others_load_what_has_checksums(shards: str, tmp_path: Path) -> None:
    """transformers' own class reads the files as ever."""
    model = tiny(3, dtype=torch.float32, mask_token_id=None)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert type(other).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    for file in tmp_path.glob("*.safetensors"):
        header = read_header(file)
        assert header.checksums.keys() == header.tensors.keys()


@pytest.mark.parametrize(
    ("line", "said"),
    [("{0}/none", "no folder of a model"), ("{0}/llama", "another format"), ("{0}/model --results {0}/bad", "JSON")],
)
def test_what_has_no_card(line: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder.parent
    (root / "llama").mkdir()
    (root / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (root / "bad").write_text("{")
    with pytest.raises(SystemExit) as ended:
        main(["card", *(word.format(root) for word in line.split())])
    assert ended.value.code == 2 and said in capsys.readouterr().err
