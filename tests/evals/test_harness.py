"""lm-evaluation-harness runs tasks on a tiny model, offline, from YAML files and local lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from hybrid import HybridForCausalLM
from hybrid.evals.benchmarks.harness import HybridLM
from hybrid.evals.likelihood import ar_nll
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import train_bpe

TOKENIZER = train_bpe(["1 + 2 = 3\n4 + 5 = 9\n" * 20], 270)
OUTPUTS = {
    "open": "output_type: generate_until\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['\\n', '7'], max_gen_toks: 9, do_sample: false, temperature: 0.0}\n",
    "choice": "output_type: multiple_choice\ndoc_to_target: '{{answer}}'\ndoc_to_choice: ['1', '2', '3', '14']\n"
    "metric_list: [{metric: acc}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}} {{answer}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
}


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    given = {"mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    return tiny(1, vocab_size=len(TOKENIZER), max_position_embeddings=64, **given)


@pytest.fixture(scope="module")
def folder(model: HybridForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    save_folder(model, TOKENIZER, root / "model")
    lines = [{"question": f"{a} + {b} =" + " " * (a % 2), "answer": str(a + b)} for a in range(1, 3) for b in range(3)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "tasks").mkdir()
    for name, output in OUTPUTS.items():
        (root / "tasks" / f"{name}.yaml").write_text(
            f"task: sums_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: '{root / 'sums.jsonl'}'}}, cache_dir: '{root / 'cache'}'}}\n"
            f"doc_to_text: '{'' if name == 'rolling' else '{{question}}'}'\n{output}"
        )
    return root


@pytest.fixture(scope="module")
def manager(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder / "tasks"), include_defaults=False)


def answers(lm: Any, manager: TaskManager, *tasks: str, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """Results, and the answer to every request."""
    found = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    samples = found["samples"]
    return dict(found["results"]), [sample["resps"] for task in tasks for sample in samples[task]]


WAYS: dict[str, dict[str, Any]] = {
    "ar": {}, "block": {"mode": "block", "likelihood": "block", "samples": 5, "confidence_threshold": 0.3},
    "diffusion": {"mode": "diffusion", "likelihood": "masked", "samples": 5},
    "speculative": {"mode": "speculative"},
    "sampled": {"mode": "block", "do_sample": True, "temperature": 1.2, "top_k": 50, "likelihood": "masked"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_batch_size_changes_nothing(way: str, model: HybridForCausalLM, manager: TaskManager) -> None:
    found = [
        answers(
            HybridLM(model, tokenizer=TOKENIZER, batch_size=size, **WAYS[way]), manager,
            "sums_open", "sums_choice", "sums_rolling",
        )
        for size in (1, 4)
    ]  # fmt: skip
    (results, one), (other_results, four) = found
    written, scored = one[:6], one[6:]
    assert written == four[:6] and len(scored) == 12
    assert all("\n" not in text and "7" not in text for ((text,),) in written)
    numbers = [torch.tensor([value for row in rows for (value, *_) in _pairs(row)]) for rows in (scored, four[6:])]
    assert len(numbers[0]) == 6 * 4 + 6 and torch.allclose(*numbers, atol=1e-9, rtol=0)
    assert results["sums_choice"]["acc,none"] == other_results["sums_choice"]["acc,none"]
    assert 0 <= results["sums_open"]["exact_match,none"] <= 1


def _pairs(row: Any) -> list[tuple[Any, ...]]:
    """(value, greedy) of each choice, or (value,) of a whole text."""
    return [x[0] if isinstance(x[0], tuple | list) else tuple(x) for x in row]


def test_it_is_found_by_its_name(folder: Path, manager: TaskManager, model: HybridForCausalLM) -> None:
    ways = ",".join(f"{name}={value}" for name, value in WAYS["block"].items())
    named = f"pretrained={folder / 'model'},dtype=float64,{ways}"
    by_name = answers("hybrid", manager, "sums_open", "sums_choice", model_args=named, batch_size=3)
    by_hand = answers(HybridLM(model, tokenizer=TOKENIZER, **WAYS["block"]), manager, "sums_open", "sums_choice")
    assert by_name[1][:6] == by_hand[1][:6]


def requests(kind: str, *args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in args]  # type: ignore[arg-type]


def exact(model: HybridForCausalLM, given: list[int], scored: list[int]) -> float:
    ids = torch.tensor([given + scored])
    return -float(ar_nll(model, ids, torch.arange(ids.shape[1])[None] >= len(given)))


def test_likelihoods_are_of_the_continuation_alone(model: HybridForCausalLM) -> None:
    lm = HybridLM(model, tokenizer=TOKENIZER)
    pairs = [("1 + 2 =", " 3\n"), ("", "4 + 5"), ("1 + 2 = ", "3")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        given, whole = TOKENIZER.encode(context.rstrip()), TOKENIZER.encode(context + continuation)
        assert whole[: len(given)] == given
        assert value == pytest.approx(exact(model, [1, *given], whole[len(given) :]))


def test_a_whole_text_is_scored_once_in_windows(model: HybridForCausalLM) -> None:
    lm, text = HybridLM(model, tokenizer=TOKENIZER, max_length=8), "9 + 8 = 17, and 26 + 3 is 29"
    ids = TOKENIZER.encode(text)
    want, at = 0.0, 0
    while at < len(ids):
        end = min(at + 7, len(ids))
        # The last window reaches back as far as the context allows.
        given = [1] if at == 0 else ids[max(0, end - 8) : at]
        want += exact(model, given, ids[at:end])
        at = end
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",)), disable_tqdm=True)
    assert found == [pytest.approx(want), 0.0]


def test_repeats_of_a_sampled_request_differ_and_a_seed_repeats_them(model: HybridForCausalLM) -> None:
    asked = requests("generate_until", *[("1 +", {"until": [], "do_sample": True, "temperature": 2.0})] * 3)
    runs = [
        HybridLM(model, tokenizer=TOKENIZER, seed=seed, max_gen_toks=12).generate_until(asked, disable_tqdm=True)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2] and len(set(runs[0])) == 3


def test_what_is_given_here_wins_over_the_task(model: HybridForCausalLM) -> None:
    lm = HybridLM(model, tokenizer=TOKENIZER, do_sample=True, temperature=2.0, repetition_penalty=3.0)
    task = {"until": "\n", "do_sample": False, "temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 5}
    count, until, options = lm._asked(task)
    want = {"mode": "ar", "do_sample": True, "temperature": 2.0, "repetition_penalty": 3.0}
    assert (count, until, options) == (5, ["\n"], want)
    plain = HybridLM(model, tokenizer=TOKENIZER)
    assert plain._asked({"temperature": 0.7, "top_k": 3})[2]["do_sample"] is True
    assert plain._asked({"do_sample": False, "temperature": 0.7}) == (32, [], {"mode": "ar", "do_sample": False})


def test_a_long_prompt_keeps_its_end(model: HybridForCausalLM) -> None:
    lm = HybridLM(model, tokenizer=TOKENIZER, max_length=20)
    long = "1 + 2 = 3, " * 9
    found = lm.generate_until(requests("generate_until", (long, {"max_gen_toks": 6, "until": []})), disable_tqdm=True)
    ids = torch.tensor([TOKENIZER.encode(long)[-14:]])
    want = model.generate(ids, max_new_tokens=6)[0, 14:]  # type: ignore[index]
    assert found == [TOKENIZER.decode(want, skip_special_tokens=True)]


@pytest.mark.parametrize(("run", "said"), [
    (lambda lm: lm.loglikelihood(requests("loglikelihood", ("1", " 2" * 80))), "continuation .* max_length is 64"),
    (lambda lm: lm.generate_until(requests("generate_until", ("1", {"max_gen_toks": 64}))), "max_gen_toks: .*64"),
    (lambda lm: lm.generate_until(requests("generate_until", ("1", {"beams": 2}))), "no argument 'beams'"),
    (lambda lm: lm.apply_chat_template([{"role": "user", "content": "x"}]), "chat template"),
    (lambda lm: HybridLM(lm.model), "tokenizer: "),
    (lambda lm: HybridLM(lm.model, tokenizer=TOKENIZER, batch_size="auto"), "batch_size is 'auto'"),
    (lambda lm: HybridLM(lm.model, tokenizer=TOKENIZER, max_length=65), "max_length is 65"),
    (lambda lm: HybridLM(lm.model, tokenizer=TOKENIZER, max_gen_toks=64), "max_gen_toks is 64"),
    (lambda lm: HybridLM(lm.model, tokenizer=TOKENIZER, dtype="float7"), "dtype is 'float7'"),
])  # fmt: skip
def test_bad_input_is_named(run: Any, said: str, model: HybridForCausalLM) -> None:
    with pytest.raises(ValueError, match=said):
        run(HybridLM(model, tokenizer=TOKENIZER))
