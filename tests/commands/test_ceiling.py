"""`hybrid eval ceiling`: what it prints, leaves and complains of."""

import json
import re
from pathlib import Path

import pytest
import torch
from oracles import tiny

from hybrid.commands import main
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ceiling")
    tokenizer = train_bpe(["1 + 2 = 3\n" * 40], 265)
    given = {"mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    save_folder(tiny(1, dtype=torch.float32, vocab_size=len(tokenizer), **given), tokenizer, root / "model")
    lines = [json.dumps({"prompt": f"1 + {n} =", "target": f" {n + 1}"}) for n in range(4)]
    (root / "prompts.jsonl").write_text("\n".join(lines))
    return root


def test_it_finds_ceilings_and_what_rules_reach(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"eval ceiling {folder}/prompts.jsonl --model {folder}/model --block-sizes [3,4] --max-new-tokens 7 "
    line += f"--limit 3 --exhaustive --rules threshold=0.5,steps=1,leftmost --out {tmp_path}/new/found.json"
    state = torch.get_rng_state()
    main(line.split())
    assert torch.equal(torch.get_rng_state(), state)
    said = capsys.readouterr().out
    assert len(re.findall(r"ceiling \(the optimum\)", said)) == 2 and "threshold=0.5" in said
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["budget"] == 5000 and found["exhaustive"] and found["environment"]["torch"] == torch.__version__
    assert [entry["block_size"] for entry in found["ceilings"]] == [3, 4]
    for entry in found["ceilings"]:
        assert entry["prompts"] == 3 and entry["tokens_out"] <= 21
        serial = entry["rules"]["one a draft"]
        assert entry["tokens_per_draft"] >= entry["tokens_per_forward"] >= serial["tokens_per_forward"]
        assert serial["exact"] == 1
        assert list(entry["rules"]) == ["leftmost", "one a draft", "steps=1", "threshold=0.5"]
        for rule in entry["rules"].values():
            assert rule["ar_nats_per_token"] > 0
            assert rule["of_ceiling"] == pytest.approx(rule["tokens_per_forward"] / entry["tokens_per_forward"])
            assert 0 <= rule["exact"] <= rule["agreement"] <= 1
            assert rule["exact"] < 1 or rule["of_ceiling"] <= 1
    main(line.replace("--limit 3", "--limit 3 --batch-size 1").split())
    again = json.loads((tmp_path / "new" / "found.json").read_text())
    assert again["ceilings"] == found["ceilings"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rules fast=1", "rules: there is no rule 'fast'; use .*threshold"),
        ("--rules threshold=high", "rules: 'threshold=high': 'high' is not a number"),
        ("--rules first_hitting=2", "rules: 'first_hitting=2': the rule first_hitting has no option"),
        ("--rules threshold=2", "confidence_threshold is 2"),
        ("--limit 0", "limit is 0"),
        ("--block-sizes []", "block_sizes: name at least one"),
        ("--block-sizes [0]", "block_size is 0"),
        ("--budget -1", "budget is -1"),
        ("--max-new-tokens 1000", "max_new_tokens is 1000"),
    ],
)
def test_bad_values_are_one_clear_line(
    words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"eval ceiling {folder}/prompts.jsonl --model {folder}/model {words}".split())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.search(f"^hybrid: {said}", err) and len(err.splitlines()) == 1
