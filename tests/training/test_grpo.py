"""The model learns from its own texts: as a slow reference does, and whatever writes them."""

import csv
import importlib.resources
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from chances import p_value, text_law
from oracles import MASK, VOCABULARY, texts, tiny
from own_parts import ones
from tiny_job import CONFIG
from torch import Tensor
from torch.utils.data import DataLoader

from hybrid import HybridForCausalLM
from hybrid.training import GRPO, Batch, HybridTask, LoRA, Optimizer, SaveModel, SudokuData, as_batch
from hybrid.training.cli import HybridCLI
from hybrid.training.objectives.grpo import Policies, log_probs
from hybrid.training.objectives.rollouts import Texts, questions_of, write
from hybrid.training.running.start import new_model
from hybrid.training.tasks.rewards import REWARDS, reward_of
from hybrid.training.text.tokenizing import character_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn")
RECIPES = Path(str(importlib.resources.files("hybrid.training"))) / "recipes"
PROMPTS = texts(5, [9, 9, 9, 9])
LETTERS = "abcdefghijklmnopqr"
TOKENIZER = character_tokenizer(LETTERS)  # of at most VOCABULARY tokens


def vowels(prompt: str, answer: str, reference: str) -> float:
    return sum(c in "aei" for c in answer) / 3


def batch(learned: int = 4, first: int = 0) -> Batch:
    """Prompts of 5 tokens, with 4 behind them that are not to be seen."""
    target = torch.arange(9).expand(4, -1) >= 9 - learned
    return as_batch({"input_ids": torch.tensor(PROMPTS), "target": target}, first)


def moved(model: HybridForCausalLM, size: float = 0.05, seed: int = 1) -> HybridForCausalLM:
    """The same model, some steps on."""
    source = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += size * torch.randn(weight.shape, generator=source, dtype=torch.float64).to(weight.dtype)
    return model


# --- What is written ----------------------------------------------------------------------------------------


def test_a_text_is_decided_by_its_number_and_its_place_in_the_group() -> None:
    model = tiny(3)
    whole = write(model, batch(), 7, group=3, mode="ar", do_sample=True)
    assert len(whole.answers) == 12 and all(len(answer) <= 4 for answer in whole.answers)
    assert len({tuple(answer) for answer in whole.answers}) > 6
    for row in range(4):
        one = as_batch({name: value[row : row + 1] for name, value in batch().items()})
        alone = write(model, one, 7, group=2, mode="ar", do_sample=True, slots=1)
        assert alone.answers == whole.answers[3 * row : 3 * row + 2]
    for seed, first in ((8, 0), (7, 4)):
        assert write(model, batch(first=first), seed, group=3, mode="ar", do_sample=True).answers != whole.answers


def test_a_batch_of_answers_is_what_was_written() -> None:
    found = write(tiny(3, eos_token_id=4), batch(), 7, group=3, max_new_tokens=9, mode="ar", do_sample=True)
    lengths = [len(answer) for answer in found.answers]
    assert len(set(lengths)) > 2, "some end early"
    for row, answer in enumerate(found.answers):
        target, real = found.batch["target"][row], found.batch["doc"][row] >= 0
        assert found.batch["input_ids"][row][real].tolist() == [*PROMPTS[row // 3][:5], *answer]
        assert found.batch["input_ids"][row][target].tolist() == answer
        assert 4 not in answer[:-1] and (len(answer) == 9 or answer[-1] == 4)
    assert found.batch["index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("settings", [{}, {"block_size": 3}], ids=str)
def test_a_cold_law_is_written_alike_in_every_way(settings: dict[str, int]) -> None:
    model = tiny(3, peaked=0.3)
    cold = {"reward": vowels, "temperature": 1e-4, "max_new_tokens": 20}
    plain = GRPO(**cold).written(model, batch(), 0)
    drafted = GRPO(**cold, mode="speculative", **settings).written(model, batch(), 0)
    assert plain.answers == drafted.answers
    assert plain.rounds == 0 < drafted.rounds and drafted.gained > drafted.rounds


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_what_is_written_follows_the_law_that_is_learned(mode: Any) -> None:
    """Every text of four tokens, as often as its probability says, whatever the model stores for its users."""
    fields = {"vocab_size": 4, "mask_token_id": 3, "eos_token_id": None}
    model = tiny(5, **fields)
    model.generation_config.top_p, model.generation_config.repetition_penalty = 0.5, 1.5
    law = text_law(model, temperature=0.8)
    prompt = as_batch({"input_ids": torch.tensor([[0, 2]]), "labels": torch.tensor([[-100, -100]])})
    found = GRPO(reward=vowels, group=2048, temperature=0.8, max_new_tokens=4, mode=mode).written(model, prompt, 2)
    assert p_value(Counter(map(tuple, found.answers)), law) > 1e-3
    assert model.generation_config.top_p == 0.5
    # And the law that is learned is that law.
    chances = log_probs(model, found.batch, 0.8).view(-1, 4).sum(1).exp()
    for answer, chance in zip(found.answers[:50], chances.tolist(), strict=False):
        assert chance == pytest.approx(law[tuple(answer)], rel=1e-9)


def test_a_row_is_one_prompt() -> None:
    ids = torch.tensor(PROMPTS)
    rows = {"input_ids": ids, "labels": torch.where(torch.arange(9) < torch.tensor([[3], [9], [5], [2]]), -100, ids)}
    rows["labels"][3, 6:] = -100
    found = questions_of(as_batch(rows))
    assert [len(q.prompt) for q in found] == [3, 9, 5, 2]
    assert [q.reference for q in found] == [PROMPTS[0][3:], [], PROMPTS[2][5:], PROMPTS[3][2:6]]
    for given, said in (
        ({"input_ids": ids}, "row 0 has no prompt"),
        ({"input_ids": ids, "doc": torch.arange(9).expand(4, -1) // 5}, "several documents"),
    ):
        with pytest.raises(ValueError, match=said):
            questions_of(as_batch(given))
    with pytest.raises(ValueError, match=r"row 1 has no answer.*max_new_tokens"):
        write(tiny(3), as_batch(rows), 0, group=2, mode="ar")


# --- What is learned ----------------------------------------------------------------------------------------


def by_hand(
    model: HybridForCausalLM, writer: HybridForCausalLM, start: HybridForCausalLM, found: Texts, rewards: Tensor,
    grpo: GRPO,
) -> dict[str, Tensor]:  # fmt: skip
    """The formulas of the docstring, a token at a time."""
    sums = {"policy": torch.zeros((), dtype=torch.float64), "kl": torch.zeros((), dtype=torch.float64)}
    clipped = 0
    for number, answer in enumerate(found.answers):
        group = rewards[number // grpo.group].tolist()
        mean = math.fsum(group) / len(group)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / len(group))
        advantage = group[number % grpo.group] - mean
        if grpo.scale == "deviation":
            advantage = advantage / spread if spread > 1e-9 else 0.0
        whole = [*found.questions[number // grpo.group].prompt, *answer]

        def said(policy: HybridForCausalLM, whole: list[int] = whole) -> Tensor:
            logits = policy(torch.tensor([whole])).logits[0] / grpo.temperature
            keep = torch.arange(VOCABULARY) != MASK
            return logits.masked_fill(~keep, -torch.inf).log_softmax(-1)

        now, old, began = said(model), said(writer).detach(), said(start).detach()
        shared = len(answer) if grpo.mean == "text" else grpo.max_new_tokens
        for place in range(len(whole) - len(answer), len(whole)):
            p, p_old, s = (x[place - 1, whole[place]].exp() for x in (now, old, began))
            ratio = p / p_old
            held = min(max(float(ratio.detach()), 1 - grpo.clip), 1 + grpo.clip)
            cut = held * advantage < float(ratio.detach()) * advantage
            clipped += cut
            gain = held * advantage if cut else ratio * advantage
            sums["policy"] = sums["policy"] - gain / shared / len(found.answers)
            sums["kl"] = sums["kl"] + (s / p - (s / p).log() - 1) / shared / len(found.answers)
    return {**sums, "total": sums["policy"] + grpo.kl_weight * sums["kl"], "clipped": torch.tensor(clipped)}


SETTINGS = {
    "on the policy": GRPO(reward=vowels, group=3, max_new_tokens=6, kl_weight=0.3),
    "several steps": GRPO(reward=vowels, group=3, max_new_tokens=6, kl_weight=0.3, inner_steps=2, temperature=0.7),
    "Dr. GRPO": GRPO(
        reward=vowels, group=4, max_new_tokens=6, kl_weight=0.1, scale="none", mean="token", inner_steps=3, clip=0.1
    ),
}


@pytest.mark.parametrize("grpo", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradient_are_those_of_the_formulas(grpo: GRPO) -> None:
    fields = {"eos_token_id": 4}
    start, model = tiny(3, **fields), moved(tiny(3, **fields), 0.03)
    writer = model if grpo.inner_steps == 1 else moved(tiny(3, **fields), 0.02, seed=9)
    found = grpo.written(writer, batch(), 0)
    rewards = torch.rand(4, grpo.group, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rewards[2] = 0.1  # its mean is not 0.1 to the last bit
    want = by_hand(model, writer, start, found, rewards, grpo)
    want["total"].backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    losses = grpo.losses(model, found, rewards, writer, start)
    losses.total.backward()
    assert float(losses.total) == pytest.approx(float(want["total"]), rel=1e-9, abs=1e-12)
    for name in ("policy", "kl"):
        assert float(losses.mean(name)) == pytest.approx(float(want[name]), rel=1e-8, abs=1e-12)  # type: ignore[arg-type]
    tokens = sum(map(len, found.answers))
    assert float(losses.parts["clipped"].total) == float(want["clipped"])
    assert (float(want["clipped"]) > 0.02 * tokens) == (grpo.inner_steps > 1)
    assert float(losses.mean("undecided")) == 1 / 4  # type: ignore[arg-type]
    assert float(losses.mean("reward")) == pytest.approx(float(rewards.mean()))  # type: ignore[arg-type]
    assert float(losses.mean("written")) == tokens / len(found.answers)  # type: ignore[arg-type]
    assert wanted and max(float(grad.abs().max()) for grad in wanted.values()) > 1e-3
    for name, weight in model.named_parameters():
        assert weight.grad is not None and (weight.grad - wanted[name]).abs().max() < 1e-9, name
    others = [policy for policy in (start, writer) if policy is not model]
    assert all(weight.grad is None for policy in others for weight in policy.parameters())


def test_a_group_of_equals_says_nothing_and_others_are_of_mean_0_and_variance_1() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0], [-3.0, 5.0, 7.5], [1e9, 1e9, 1e9]], dtype=torch.float64)
    found = GRPO(reward=vowels, group=3).advantages(rewards)
    assert found[[0, 3]].tolist() == [[0.0] * 3] * 2
    assert found[1:3].mean(1).abs().max() < 1e-12
    torch.testing.assert_close(found[1:3].square().mean(1), torch.ones(2, dtype=torch.float64))
    assert found[1, 1] > 0 > found[1, 0] == found[1, 2]
    plain = GRPO(reward=vowels, group=3, scale="none").advantages(rewards)
    assert plain[2].tolist() == pytest.approx([-3 - 9.5 / 3, 5 - 9.5 / 3, 7.5 - 9.5 / 3]) and not plain[0].any()


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """Summed over all texts with their probabilities, without dividing by a deviation: what is estimated is right."""
    model = tiny(5, vocab_size=4, mask_token_id=3, eos_token_id=None)
    grpo = GRPO(reward=vowels, group=81, scale="none", mean="token", max_new_tokens=4, kl_weight=0)
    answers = [list(text) for text in itertools.product(range(3), repeat=4)]
    rows = torch.tensor([[0, 2, *answer] for answer in answers])
    target = torch.arange(6).expand(81, -1) >= 2
    found = Texts(
        questions=questions_of(as_batch({"input_ids": rows[:1], "target": target[:1]})), answers=answers, rounds=0,
        gained=0, batch=as_batch({"input_ids": rows, "target": target}),
    )  # fmt: skip
    worth = torch.rand(81, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chance = log_probs(model, found.batch).view(81, 4).sum(1).exp()
    expected = (chance * worth).sum()
    expected.backward()
    wanted = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    # A text that is as likely as c of 81 counts as c texts: importance by hand, the same for all its tokens.
    assert float(chance.detach().sum()) == pytest.approx(1)
    mean = float(expected.detach())
    rewards = 81 * (worth - mean) * chance.detach()
    grpo.losses(model, found, (rewards - rewards.mean())[None], model, None).total.backward()
    ours = [-4 * weight.grad for weight in model.parameters() if weight.grad is not None]
    for one, other in zip(ours, wanted, strict=True):
        assert (one - other).abs().max() < 1e-9


# --- The job ------------------------------------------------------------------------------------------------

FIELDS = {**CONFIG, "vocab_size": len(TOKENIZER), "mask_token_id": TOKENIZER.mask_token_id}


class Prompts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Prompts of four letters, and four that are not to be seen."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(number)
        first = TOKENIZER.convert_tokens_to_ids("a")
        ids = torch.randint(first, first + len(LETTERS), (8,), generator=source)
        return {"input_ids": ids, "labels": torch.where(torch.arange(8) < 4, -100, ids)}


def job(
    steps: int, folder: Path | None = None, batch_size: int = 4, resume: Any = None, data: Any = None, **given: Any
) -> Any:  # fmt: skip
    """A task after so many steps, and the trainer."""
    settings = {"reward": vowels, "group": 4, "kl_weight": 0.1, **given.pop("grpo", {})}
    given.setdefault("optimizer", Optimizer(lr=0.01, warmup_steps=0, decay="none"))
    given = {"config": FIELDS, "tokenizer": TOKENIZER, **given}
    task = given.pop("task", None) or HybridTask(objective=GRPO(**settings), **given)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, accumulate_grad_batches=4 // batch_size,
        callbacks=[SaveModel(str(folder))] if folder else [], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(task, data or DataLoader(Prompts(), batch_size=batch_size), ckpt_path=resume)
    return task, trainer


def same(one: HybridTask, other: HybridTask) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_texts_become_what_the_reward_asks_for_and_the_start_holds_them_back() -> None:
    def reward(kl_weight: float) -> tuple[float, float]:
        task, trainer = job(30, grpo={"kl_weight": kl_weight, "group": 8})
        (held_out,) = trainer.validate(task, DataLoader(Prompts(), batch_size=12), verbose=False)
        (again,) = trainer.validate(task, DataLoader(Prompts(), batch_size=5), verbose=False)
        assert held_out == pytest.approx(again, abs=1e-6)
        return held_out["val/reward"], held_out.get("val/kl", math.nan)

    free, held = reward(0.0), reward(3.0)
    chance = 4 * 3 / len(TOKENIZER) / 3
    assert free[0] > 3 * chance and math.isnan(free[1]), "and no copy of the start is kept"
    assert free[0] > held[0] + 0.2 and 0 < held[1] < 0.5


@pytest.mark.one_in(3)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_a_resumed_job_ends_where_an_unharmed_one_does(inner_steps: int, tmp_path: Path) -> None:
    """Stopped in the midst of what one set of weights writes: who writes, and who was the start, go on as they were."""

    def puzzles(steps: int, folder: Path | None = None, **more: Any) -> Any:
        settings = {"reward": ones, "inner_steps": inner_steps, "max_new_tokens": 6}
        if "task" not in more:
            more |= {"config": CONFIG, "tokenizer": None, "grpo": settings}
        return job(steps, folder, data=SudokuData(count=20, batch_size=4), **more)

    whole, trainer = puzzles(6)
    puzzles(3, tmp_path / "model")
    state = tmp_path / "model.ckpt"
    kept = state.read_bytes()
    resumed, again = puzzles(6, tmp_path / "model", resume=state)
    assert again.global_step == 6 and same(whole, resumed)
    assert again.callback_metrics["train/kl"] == trainer.callback_metrics["train/kl"] > 0
    state.write_bytes(kept)
    loaded = HybridTask.load_from_checkpoint(state, objective=whole.objective)
    puzzles(6, resume=state, task=loaded)
    assert same(whole, loaded)
    folder = HybridForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(weight, folder[name]) for name, weight in resumed.model.state_dict().items())


def test_accumulated_batches_are_one_step() -> None:
    whole, parts = job(3, grpo={"inner_steps": 2})[0], job(3, batch_size=2, grpo={"inner_steps": 2})[0]
    assert parts.global_step == 3
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_the_writer_is_the_model_of_some_steps_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    real = GRPO.written

    def noting(self: GRPO, writer: HybridForCausalLM, *given: Any) -> Texts:
        task = tasks[0]
        written.append(all(map(torch.equal, writer.parameters(), task.model.parameters())))
        return real(self, writer, *given)

    monkeypatch.setattr(GRPO, "written", noting)
    tasks = [HybridTask(config=FIELDS, tokenizer=TOKENIZER, objective=GRPO(reward=vowels, inner_steps=3))]
    job(7, task=tasks[0])
    assert written == [True, False, False, True, False, False, True]


def test_low_rank_deltas_learn_from_texts_too() -> None:
    task, trainer = job(4, lora=LoRA(rank=2), grpo={"inner_steps": 2})
    assert trainer.callback_metrics["train/kl"] > 0
    assert all("lora" in name for name, weight in task.named_parameters() if weight.requires_grad)


def test_what_stands_beside_does_not_learn() -> None:
    task, _ = job(3, grpo={"inner_steps": 2})
    assert isinstance(task.beside, Policies)
    fresh = new_model(FIELDS, None, 0)
    assert task.beside.start is not None
    assert all(map(torch.equal, task.beside.start.parameters(), fresh.parameters()))
    assert not any(map(torch.equal, task.model.parameters(), fresh.parameters()))
    assert not any(weight.requires_grad for weight in task.beside.parameters())


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_a_recipe_goes_on_from_what_another_leaves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = {kind: RECIPES / f"{name}{kind}.yaml" for kind in ("", "-grpo")}
    small = [
        "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=2",
        "--data.init_args.count=20", "--data.init_args.batch_size=3",
    ]  # fmt: skip
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = [f"--model.config.{field}={value}" for field, value in sizes.items()]
    HybridCLI.run(["fit", "--config", str(recipes[""]), *small, *model, "--trainer.limit_val_batches=0"])
    HybridCLI.run(["fit", "--config", str(recipes["-grpo"]), *small])
    with (tmp_path / f"runs/logs/{name}-grpo/metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["train/written"]) > 0 and row["train/reward"] != "" for row in rows] == [True, True]
    found = [HybridForCausalLM.from_pretrained(f"runs/{folder}").config.to_dict() for folder in (name, f"{name}-grpo")]
    assert {**found[0], "_name_or_path": ""} == {**found[1], "_name_or_path": ""}

    def questions(kind: str) -> dict[str, Any]:
        given = yaml.safe_load(recipes[kind].read_text())["data"].get("init_args", {})
        return {field: value for field, value in given.items() if field != "batch_size"}

    assert questions("") == questions("-grpo")


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fields", "said"),
    [
        ({"reward": "best"}, {}, r"reward is 'best'; use one of \['reference', 'countdown'\], or package.module.name"),
        ({"reward": "own_parts.nothing"}, {}, "reward is 'own_parts.nothing'"),
        ({"group": 1}, {}, "group is 1.*2 or more"),
        ({"scale": "variance"}, {}, "scale is 'variance'; use 'deviation' or 'none'"),
        ({"mean": "words"}, {}, "mean is 'words'; use 'text' or 'token'"),
        ({"mean": "token"}, {}, "mean='token': .* needs max_new_tokens"),
        ({"clip": 0.0}, {}, "clip is 0"),
        ({"kl_weight": -1.0}, {}, "kl_weight is -1"),
        ({"inner_steps": 0}, {}, "inner_steps is 0"),
        ({"temperature": 0.0}, {}, "temperature is 0.0; texts are drawn"),
        ({"max_new_tokens": 0}, {}, "max_new_tokens is 0"),
        ({"max_new_tokens": 256}, {}, "max_new_tokens is 256.*context of 256"),
        ({"mode": "block"}, {}, "mode is 'block'; texts must follow the law that is learned: use 'ar' or"),
        ({"mode": "speculative"}, {"mask_token_id": None}, "needs a mask token"),
        ({"block_size": 4}, {}, "block_size is 4; it is the window of mode='speculative'"),
        ({"block_size": 1, "mode": "speculative"}, {}, "block_size is 1"),
        ({"slots": 0}, {}, "slots is 0"),
        ({}, {"clean_attention": "block"}, "left-to-right probabilities.*'block'.*use a clean_attention='causal'"),
        ({}, {"clean_attention": "full"}, "left-to-right probabilities.*'full'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_named(given: Any, fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GRPO(**{"reward": vowels, **given}).check(tiny(**fields).config, 9)


def test_a_job_without_a_tokenizer_is_refused() -> None:
    task = HybridTask(config=FIELDS, objective=GRPO(reward=vowels))
    with pytest.raises(ValueError, match="a reward reads text, so the task needs a tokenizer"):
        job(1, task=task)


@pytest.mark.parametrize("worth", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(worth: float) -> None:
    with pytest.raises(ValueError, match=f"the reward of a text is {worth}"):
        job(1, grpo={"reward": lambda prompt, answer, reference: worth})


def test_rewards_are_found_by_name_and_are_what_they_say() -> None:
    assert reward_of("reference") is REWARDS["reference"] and reward_of(vowels) is vowels
    assert reward_of("own_parts.ones")("", "0110", "0110") == 0.5
    assert [REWARDS["reference"]("1.=", answer, "12") for answer in ("12", "121", "")] == [1, 0, 0]
    problem = "20,7,5,3:43="
    assert [REWARDS["countdown"](problem, answer, "") for answer in ("20*(7-5)+3", "3+(7-5)*20", "43")] == [1, 1, 0]
