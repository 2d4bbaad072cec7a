"""`hybrid bench loading`: both sides hold the same weights, and what is said of them was measured."""

from pathlib import Path

import pytest
import torch
from oracles import tiny

from hybrid.commands import main
from hybrid.evals.timing.loading import CHECKED, OURS, THEIRS, convert_peak, loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "ours"
    tiny(3, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.slow  # starts two processes that import everything
def test_what_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = loading(folder, rounds=3)
    assert list(found.seconds) == [OURS, CHECKED, THEIRS] and all(len(x) == 3 for x in found.seconds.values())
    assert min(min(times) for times in found.seconds.values()) > 0 and found.ratio(THEIRS) == 1
    assert found.weights == (folder / "model.safetensors").stat().st_size and found.peak >= 0
    main(["bench", "--loading", str(folder), "--rounds", "1"])
    said = capsys.readouterr().out
    assert OURS in said and THEIRS in said and "times its" in said


@pytest.mark.slow
def test_what_cannot_be_converted_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        convert_peak(tmp_path / "nothing", tmp_path / "out")
