"""Every recipe and size is what it says it is, and every command of a job does what it says, on the user's own text."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import tiny
from transformers import AutoTokenizer

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.training.cli import HybridCLI, JobTrainer, with_sizes
from hybrid.training.objective import Objective
from hybrid.training.running.sharding import Sharded, check_strategy
from hybrid.training.text.tokenizing import train_bpe

pytestmark = pytest.mark.usefixtures("undrawn")
FOLDER = importlib.resources.files("hybrid.training") / "recipes"
RECIPES = sorted(entry.name for entry in FOLDER.iterdir() if entry.is_file())
SIZES = sorted(entry.name for entry in (FOLDER / "sizes").iterdir())
STATED = re.compile(r"([\d.]+)(M|B) parameters with a vocabulary of ([\d,]+)")


def path(name: str) -> str:
    return str(FOLDER / name)


def stated(text: str) -> tuple[float, float, int] | None:
    """What a file says of its model: parameters, how far that is rounded, and the vocabulary."""
    found = STATED.search(" ".join(text.replace("\n#", " ").split()))
    if found is None:
        return None
    unit = {"M": 1e6, "B": 1e9}[found[2]]
    decimals = len(found[1].partition(".")[2])
    return float(found[1]) * unit, 0.5 * unit / 10**decimals, int(found[3].replace(",", ""))


@pytest.mark.parametrize("name", [*RECIPES, *(f"sizes/{size}" for size in SIZES)])
def test_a_model_has_as_many_parameters_as_its_file_says(name: str) -> None:
    text = Path(path(name)).read_text()
    document, found = yaml.safe_load(text), stated(text)
    if found is None:
        assert "sizes" not in name
        assert "gpu" not in str(document["trainer"]), "who needs a GPU must know how large the model is"
        return
    parameters, rounding, vocabulary = found
    assert document["data"]["init_args"]["vocab_size"] == vocabulary
    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig(vocab_size=vocabulary, mask_token_id=0, **document["model"]["config"]))
    assert abs(model.num_parameters() - parameters) <= rounding
    Objective().check(model.config, document["data"]["init_args"]["length"])


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        HybridCLI.run([*words, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_understood_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every field of the file is there again, with its value."""
    found, said = printed(["fit", "--config", path(name)], capsys), yaml.safe_load(Path(path(name)).read_text())

    def compare(ours: Any, theirs: Any, place: str) -> None:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            theirs = theirs if "class_path" in ours or "class_path" not in theirs else theirs["init_args"]
            for key, value in ours.items():
                compare(value, theirs[key], f"{place}.{key}")
        elif isinstance(theirs, dict) and isinstance(ours, str):  # a class by its name
            assert theirs["class_path"] == ours
        elif place != ".trainer.callbacks":
            assert theirs == ours, place
        else:
            assert [entry["class_path"] for entry in theirs] == [entry["class_path"] for entry in ours]

    compare(said, found, "")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_asks_for_processes_that_lightning_can_start(name: str) -> None:
    asked = yaml.safe_load(Path(path(name)).read_text())["trainer"]
    chosen = {key: asked[key] for key in ("strategy", "num_nodes", "precision") if key in asked}
    trainer = JobTrainer(accelerator="cpu", devices=asked.get("devices", 1), logger=False, **chosen)
    check_strategy(trainer)
    assert isinstance(trainer.strategy, Sharded) == (name == "fsdp.yaml")
    assert trainer.world_size == asked.get("devices", 1) * asked.get("num_nodes", 1)


def test_a_size_changes_what_it_names_and_what_follows_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", path("stdlib.yaml"), "--size", "30m", "--model.config.num_hidden_layers=3"]
    found = printed(words, capsys)
    assert found["model"]["config"]["hidden_size"] == 512
    assert found["model"]["config"]["num_hidden_layers"] == 3
    assert found["model"]["config"]["block_size"] == 8, "the recipe's own"
    assert (found["data"]["init_args"]["vocab_size"], found["model"]["optimizer"]["warmup_steps"]) == (8192, 500)
    assert with_sizes(["--size=30m"]) == with_sizes(["--size", path("sizes/30m.yaml")])


def test_an_unknown_size_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="--size is '7b'; use one of 135m, 1b, 30m, 6m, or a YAML file"):
        HybridCLI.run(["fit", "--size", "7b"])


# --- Recipes for the user's own text ------------------------------------------------------------------------

LINES = [f"def function_{n}(argument):\n    return argument * {n}\n\n" for n in range(120)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the recipes expect it: data, and a converted model with its tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    for part, lines in (("train", LINES[:80]), ("validation", LINES[80:100]), ("test", LINES[100:])):
        (folder / "data" / part).mkdir(parents=True)
        (folder / "data" / part / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = train_bpe(LINES, 280)
    tokenizer.save_pretrained(folder / "runs" / "converted")
    config = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "max_position_embeddings": 64}
    tiny(0, **config).save_pretrained(folder / "runs" / "converted")
    return folder


def small(name: str) -> list[str]:
    """The recipe on this machine, two steps long and with a model of nothing."""
    words = [
        "--config", path(name), "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1",
        "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.precision=32-true",
        "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches=1",
        "--trainer.log_every_n_steps=1", "--data.init_args.batch_size=4", "--data.init_args.length=32",
        "--data.init_args.train=[data/train/*.jsonl]", "--data.init_args.validation=[data/validation/*.jsonl]",
        "--data.init_args.test=[data/test/*.jsonl]", "--data.init_args.num_workers=0", "--model.compile=false",
    ]  # fmt: skip
    if "config" in yaml.safe_load(Path(path(name)).read_text())["model"]:
        sizes = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        }  # fmt: skip
        words += [f"--model.config.{field}={value}" for field, value in sizes.items()]
        words.append("--data.init_args.vocab_size=280")
    return words


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("one-gpu.yaml", "fsdp.yaml", "convert.yaml")]
OWN_TEXT = ["eight-gpus.yaml", "lora.yaml", *SLOW]


@pytest.mark.parametrize("name", OWN_TEXT)
def test_recipes_for_own_text_run(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    HybridCLI.run(["fit", *small(name), "--out", str(tmp_path / "model")])
    model = HybridForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    start = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("def f")]])
    assert model.generate(start, mode="block", max_new_tokens=3).shape == (1, start.shape[1] + 3)
    assert (tmp_path / "model" / "adapter").exists() == (name == "lora.yaml")


def test_what_is_trained_is_validated_tested_and_told_row_by_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = [*small("one-gpu.yaml"), "--out", str(tmp_path / "model")]
    for command in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=rf"{command}: there is no .*model.ckpt, so no weights: train first"):
            HybridCLI.run([command, *words])
    fitted = HybridCLI.run(["fit", *words])
    trained = fitted.trainer.callback_metrics
    found = HybridCLI.run(["validate", *words]).trainer.callback_metrics
    assert float(found["val/loss"]) == pytest.approx(float(trained["val/loss"])), "of the weights that were trained"

    figures = HybridCLI.run(["test", *words]).trainer.callback_metrics
    run = HybridCLI.run(["predict", *words])
    lines = [json.loads(line) for line in (tmp_path / "model-predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(len(run.datamodule.test_rows)))
    assert "return argument * 11" in "".join(line["text"] for line in lines), "the text held out for the test"
    # What is left to right is exact, so that the mean over rows, weighted by their targets, is that over all.
    model, rows = HybridForCausalLM.from_pretrained(tmp_path / "model"), run.datamodule.test_rows
    for line in lines[:3]:
        ids, doc = rows.ids[line["row"]].long()[None], rows.doc[line["row"]]
        logits = model(ids, layout=_apart(doc)).logits[0, :-1].double()
        logits[:, model.config.mask_token_id] = -torch.inf
        same = doc[1:] == doc[:-1]
        nll = torch.nn.functional.cross_entropy(logits[same], ids[0, 1:][same])
        assert line["ar"] == pytest.approx(nll.item(), rel=1e-4)
        assert line["targets"] == 32
    assert float(figures["test/ar"]) == pytest.approx(sum(line["ar"] for line in lines) / len(lines), rel=0.05)


def _apart(doc: torch.Tensor) -> Any:
    from hybrid import Layout

    place = torch.arange(len(doc))[None]
    return Layout.of(place, place, 0, doc.long()[None])


# --- What is wrong is said before any work ------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Nobody may read the texts."""
    monkeypatch.chdir(place)

    def fail(*_: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("hybrid.training.data.TextData.load", fail)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.config.hiden_size=3"], "config: hiden_size is no field of HybridConfig"),
        (["--model.config.head_dim=7"], "head_dim is 7"),
        (["--model.config.max_position_embeddings=31"], "rows of 32 tokens.*max_position_embeddings is 31"),
        (["--model.objective.noise.block_sizes=[40]"], r"block_sizes is \(40,\).*the sequence length, 32"),
        (["--data.init_args.length=1"], "length is 1"),
        (["--data.init_args.num_workers=-1"], "num_workers is -1"),
        (["--data.init_args.train=[nowhere/*.txt]"], "train: 'nowhere/.*' matches no file"),
        (["--data.init_args.test=[nowhere/*.txt]"], "test: 'nowhere/.*' matches no file"),
        (["--data.init_args.tokenizer=unmasked"], "tokenizer has no mask token"),
        (["--model.objective.ar_weight=0", "--model.objective.diffusion_weight=0"], "one must be above 0"),
        (["--ckpt_path=missing.ckpt"], "there is no checkpoint missing.ckpt"),
        (["--ckpt_path=foreign.ckpt"], "foreign.ckpt was not written by a Lightning job.*init_from"),
        (["--ckpt_path=trained.ckpt", "--model.config.intermediate_size=48"], r"another model: .*\[16, 24\] there.*48"),
        (["--ckpt_path=trained.ckpt", "--model.config.num_hidden_layers=2"], "another model: .*layers.1.*None there"),
        (["--ckpt_path=trained.ckpt", "--model.lora.rank=2"], "another model: .*lora_A.*None there"),
    ],
)
@pytest.mark.usefixtures("unread")
def test_what_is_wrong_is_said_before_the_data_are_read(
    change: list[str], said: str, place: Path, tmp_path: Path, trained: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        HybridCLI.run(["fit", *small("one-gpu.yaml"), "--out", str(tmp_path / "model"), *change])
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """What checkpoints there are beside the data: one of this job, and one of another library."""
    torch.save({"model": {"weight": torch.zeros(2)}, "step": 3}, place / "foreign.ckpt")
    tokenizer = AutoTokenizer.from_pretrained(place / "runs" / "converted")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(place / "unmasked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        HybridCLI.run(["fit", *small("one-gpu.yaml"), "--out", str(place / "trained"), "--trainer.max_steps=1"])
    return place / "trained.ckpt"


@pytest.mark.usefixtures("unread")
def test_a_model_to_go_on_from_is_checked_too(place: Path, tmp_path: Path) -> None:
    words = ["fit", *small("convert.yaml"), "--out", str(tmp_path / "model")]
    with pytest.raises(ValueError, match=r"rows of 65 tokens.*max_position_embeddings is 64"):
        HybridCLI.run([*words, "--data.init_args.length=65"])
    train_bpe(LINES * 9, 300).save_pretrained(place / "larger")
    with pytest.raises(ValueError, match=r"init_from: runs/converted knows \d+ tokens.*makes \d+.*own tokenizer"):
        HybridCLI.run([*words, "--data.init_args.tokenizer=larger"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_corpus_that_is_empty_after_splitting_is_named(
    split: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "empty.txt").write_text("")
    change = [f"--data.init_args.{split}=[{tmp_path}/empty.txt]", "--data.init_args.tokenizer=runs/converted"]
    with pytest.raises(ValueError, match=f"{split}: the text has 1 tokens, less than one row of 32: give more text"):
        HybridCLI.run(["fit", *small("one-gpu.yaml"), "--out", str(tmp_path / "model"), *change])
    assert not (tmp_path / "model").exists()
