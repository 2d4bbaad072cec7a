"""What a run of wandb holds, read back from its offline file."""

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_file import artifacts, history, items, records

from hybrid.evals.report import FILES, log_results, write_report


def document() -> dict[str, Any]:
    def row(mode: str, setting: str, quality: float, speed: float | None) -> dict[str, Any]:
        return {
            "mode": mode, "setting": setting, "quality": quality, "tokens_per_forward": speed,
            "tokens_per_second": 1000.5, "lossless": mode == "ar", "settings": {"batch_size": 4},
        }  # fmt: skip

    act = {
        "name": "toy act", "title": "A toy", "quality": {"name": "solved", "unit": "share", "higher_is_better": True},
        "rows": [row("ar", "greedy", 0.75, 1.0), row("block", "block 4", 0.5, 2.5), row("block", "none", 0.25, None)],
        "samples": [{"prompt": "1 + 1 =", "target": "2", "outputs": {"greedy": "2", "block 4": "3", "none": "4"}}],
        "aup": 123.25,
    }  # fmt: skip
    about = {"schema": "hybrid-frontier/1", "created": "now", "hybrid": "0", "environment": {"threads": 1}}
    return {**about, "acts": [act]}


def file_of(folder: Path) -> Path:
    """The run's file, once wandb's own process has written all of it, which may be after the run is over."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(AssertionError):  # the file ends within a record
            if any(record.WhichOneof("record_type") == "exit" for record in records(path)):
                break
        time.sleep(0.05)
    return path


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    given = document()
    write_report(given, folder)
    log_results(given, folder, "offline")
    assert wandb.run is None, "the run is over"
    return folder


def test_tables_pictures_and_figures(logged: Path) -> None:
    (sent,) = history(file_of(logged))
    media = file_of(logged).parent / "files"
    rows = json.loads((media / sent["toy-act/rows"]["path"]).read_text())
    cells = [dict(zip(rows["columns"], line, strict=True)) for line in rows["data"]]
    assert [(c["setting"], c["quality"], c["tokens_per_forward"], c["efficient"]) for c in cells] == [
        ("greedy", 0.75, 1.0, "True"), ("block 4", 0.5, 2.5, "True"), ("none", 0.25, None, "False"),
    ]  # fmt: skip
    samples = json.loads((media / sent["toy-act/samples"]["path"]).read_text())
    assert samples["columns"] == ["prompt", "target", "ar: greedy", "block: block 4", "block: none"]
    assert samples["data"] == [["1 + 1 =", "2", "2", "3", "4"]]
    picture, page = (media / sent[name]["path"] for name in ("frontier", "report"))
    assert picture.read_bytes() == (logged / "frontier.png").read_bytes()
    assert page.read_text() == (logged / "report.html").read_text()

    summary: dict[str, Any] = {}
    for record in records(file_of(logged)):
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["toy-act/aup"] == 123.25
    assert summary["toy-act/fastest/setting"] == "block: block 4"
    assert summary["toy-act/fastest/quality"] == 0.5


def test_the_artifact_has_the_files(logged: Path) -> None:
    (artifact,) = [found for found in artifacts(file_of(logged)) if found.name == "frontier"]
    assert artifact.type == "evaluation"
    sizes = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert sizes == {name: (logged / name).stat().st_size for name in FILES}


def test_without_wandb_the_results_stay(logged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise wandb.Error("no such account")

    for name in FILES:
        shutil.copy(logged / name, tmp_path)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"wandb: no such account. The results are in .* all the same"):
        log_results(document(), tmp_path, "online")
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
