"""`hybrid eval tasks`: what it prints, leaves and complains of, with lm-evaluation-harness and without."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from oracles import tiny

from hybrid.commands import main
from hybrid.commands.eval.tasks import _acts
from hybrid.evals.results import load_results
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import train_bpe

needs_the_extra = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    tokenizer = train_bpe(["1 + 2 = 3\n" * 40], 265)
    given = {"mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    save_folder(tiny(1, dtype=torch.float32, vocab_size=len(tokenizer), **given), tokenizer, root / "model")
    (root / "own").mkdir()
    (root / "sums.jsonl").write_text("\n".join(json.dumps({"q": f"1 + {n} =", "a": f"{n + 1}"}) for n in range(4)))
    (root / "own" / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: '{root / 'sums.jsonl'}'}}, cache_dir: '{root / 'cache'}'}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\noutput_type: generate_until\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"
    )
    return root


def complaint(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(line.format(folder).split())
    assert ended.value.code == 2
    return capsys.readouterr().err


@needs_the_extra
def test_a_task_of_ones_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"eval tasks --tasks sums --include {folder / 'own'} --model {folder / 'model'} --mode block --limit 3 "
    line += f"--options confidence_threshold=0.3,block_size=3 --out {tmp_path / 'new' / 'found.json'}"
    before = torch.get_rng_state()
    main(line.split())
    assert torch.equal(torch.get_rng_state(), before)
    said = capsys.readouterr().out
    assert re.search(r"sums\W+exact_match\W+none\W+[01]\.\d{4}", said)
    assert re.search(r"\d+ tokens generated, \d+\.\d\d a forward", said)
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["settings"]["options"] == {"confidence_threshold": 0.3, "block_size": 3}
    assert found["n-samples"]["sums"]["effective"] == 3 and "exact_match,none" in found["results"]["sums"]
    (act,) = load_results(tmp_path / "new" / "found.json").plain()["acts"]
    (row,) = act["rows"]
    assert (row["mode"], row["quality"]) == ("block", found["results"]["sums"]["exact_match,none"])
    assert sum(row["per_prompt"]["quality"]) / 3 == pytest.approx(row["quality"])


@needs_the_extra
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--tasks nowhere --include {0}/own", "tasks: no task nowhere"),
        ("--tasks sums --include {0}/own --samples 0", "samples is 0"),
        ("--tasks sums --include {0}/own --options temperature=0.5", "temperature only matters"),
        ("--tasks sums --include {0}/own --options mode=ar", "options: mode .*--mode"),
    ],
)
def test_bad_values_are_one_clear_line(
    line: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(f"hybrid: .*{said}", complaint("eval tasks --model {0}/model " + line, folder, capsys))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "tasks: name at least one"),
        ("--tasks sums --limit 0", "limit is 0"),
        ("--tasks sums --include {0}/nowhere", "include: there is no folder"),
    ],
)
def test_what_is_wrong_without_a_look_at_any_task(
    line: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(f"hybrid: {said}", complaint("eval tasks --model {0}/model " + line, folder, capsys))


def test_without_the_extra_it_says_which_to_install(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "hybrid.evals.benchmarks.harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hybrid-lm\[eval\]'"):
        import hybrid.evals.benchmarks.harness  # noqa: F401
    said = complaint("eval tasks --tasks sums --model {0}/model", folder, capsys)
    assert "pip install 'hybrid-lm[eval]'" in said and len(said.splitlines()) == 1


def test_a_figure_has_the_unit_that_it_is_in() -> None:
    """A perplexity is no share, and bits a byte below 1 are none either."""
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "bits_per_byte,none": 0.9, "perplexity,none": 23.0}
    found = {
        "results": {"text": values},
        "higher_is_better": {"text": {"acc": True, "bits_per_byte": False, "perplexity": False}},
    }
    units = {act.quality.name: act.quality.unit for act in _acts(found, "ar", "ar")}
    assert units == {"acc": "share", "bits_per_byte": "bits_per_byte", "perplexity": "perplexity"}
