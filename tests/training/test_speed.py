"""`hybrid bench training` times what it says: the recipe's own step, and a plain loop that means the same."""

from pathlib import Path

import pytest
import torch

import hybrid.training.data
from hybrid.commands import main
from hybrid.training.laboratory.speed import Job, plain_loss, run_job
from hybrid.training.objective import losses
from hybrid.training.tasks.stdlib import Corpus, Document

RECIPES = Path(hybrid.training.data.__file__).parent / "recipes"
SMALL = """
out: model
model:
  config:
    hidden_size: 16
    intermediate_size: 16
    num_hidden_layers: 1
    num_attention_heads: 2
    max_position_embeddings: 64
    block_size: 4
  objective:
    diffusion_weight: 0.5
data:
  class_path: hybrid.training.data.StdlibData
  init_args:
    length: 32
    vocab_size: 300
    batch_size: 4
trainer:
  accelerator: cpu
  precision: bf16-mixed
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(autouse=True)
def little_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pages instead of the standard library; documents end within rows."""
    pages = [Document(name=f"{n}.py", text=f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 5)) for n in range(60)]
    parts = {"train": tuple(pages[:40]), "validation": tuple(pages[40:50]), "test": tuple(pages[50:])}
    corpus = Corpus(**parts, overlap={}, moved=0)
    monkeypatch.setattr(hybrid.training.data, "load_stdlib", lambda: corpus)


def test_the_plain_loop_has_the_same_loss_and_gradient(recipe: Path) -> None:
    """Written on its own, in float64: the two must agree to the last bits but a few."""
    job = run_job(recipe, 1)
    model = job.model.double().train()
    assert (job.batch["doc"] != 0).any(), "packed documents"
    found = []
    for loss in (losses(model, job.batch, job.objective, 7).total, plain_loss(model, job.batch, job.objective, 7)):
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9)
    assert not torch.equal(found[0][0], plain_loss(model, job.batch, job.objective, 8)), "another seed, another loss"


def test_a_step_is_the_recipes(recipe: Path) -> None:
    job = run_job(recipe, 3)
    assert isinstance(job, Job) and job.objective.diffusion_weight == 0.5
    assert 0 < job.waiting < 1 and job.peak_memory > 2**20
    assert job.tokens == 4 * 32
    with job.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16, "the recipe's precision"
    for group in job.optimizer.param_groups:
        group["lr"] = 0.1  # the job was at its end, and its rate 0
    for step in (job.step, job.plain_step):
        before = [p.detach().clone() for p in job.model.parameters()]
        step()
        assert any(not torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


def test_bench_training_prints_ratios_of_one_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "training", "--recipe", str(recipe), "--rounds", "2", "--steps", "2", "--profile"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "times a pure AR step on the same tokens", "times as fast as the plain loop", "Waiting for data:",
        "Peak memory of its process:", "128 tokens a step", "Self CPU", "aten::mm",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "nowhere.yaml"], "there is no nowhere.yaml"),
        (["--rounds", "0"], "rounds is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--recipe", str(RECIPES / "stdlib-ar.yaml"), "--steps", "1"], "does not train both ways"),
    ],
)
def test_bench_training_names_what_is_wrong(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "training", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_bench_alone_is_that_of_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["bench", "--rounds", "0"], ["bench", "decoding", "--rounds", "0"]):
        small = ["--hidden-size", "32", "--layers", "1", "--vocab-size", "50", "--new-tokens", "2"]
        with pytest.raises(SystemExit):
            main([*words, *small])
        assert "rounds" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = capsys.readouterr().out
    assert "decoding" in said and "training" in said
