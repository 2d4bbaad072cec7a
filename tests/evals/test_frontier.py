"""Every row of the frontier is measured on its own outputs, and means what its name says."""

import copy
import json
import math
import statistics
from collections import Counter
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from frontier_rows import (
    ALPHABET,
    NEW,
    REFERENCE_TOLD,
    SETTINGS,
    TOKENIZER,
    document,
    measure,
    model_of,
    prompts,
    untimed,
)
from oracles import MASK, slowly, texts, tiny

import hybrid.evals.passes.runs
from hybrid.evals.acts import Progress, frontier
from hybrid.evals.document import Row
from hybrid.evals.measures import Grades, Measure, edit_similarity, measures
from hybrid.evals.passes.journal import Journal
from hybrid.evals.passes.outputs import Outputs, Prompt, Setting, decode
from hybrid.evals.report import write_report
from hybrid.evals.results import check_results, load_results
from hybrid.evals.table import breaks_promise, repeatability
from hybrid.evals.timing.machine import environment
from hybrid.training.text.tokenizing import character_tokenizer

FIELDS = {
    "mode", "setting", "settings", "quality", "quality_standard_error", "exact", "distinct_2", "agreement",
    "tokens_per_forward", "tokens_per_draft", "acceptance", "tokens_per_second", "time_to_first_token", "forwards",
    "lossless", "prompts", "tokens_out", "repetition_4", "entropy", "tokens_per_forward_standard_error", "histograms",
    "per_prompt", "timing", "ar_nats_per_token", "speedup", "throughput",
}  # fmt: skip


# --- Outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "threshold"),
    [(SETTINGS[0], 0.0), (SETTINGS[1], 0.0), (SETTINGS[2], 0.3), (SETTINGS[4], 0.3)],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_outputs_are_those_of_slow_decoding(setting: Setting, threshold: float, batch_size: int) -> None:
    """Prompt by prompt, without padding, caches or batches; the oracle knows the mask by its own number."""
    model = tiny(3, peaked=1.0, block_size=4)
    given = [Prompt(ids=row, text="", target="") for row in texts(6, [3, 7, 1, 5, 12], MASK)]
    large = character_tokenizer("".join(chr(200 + i) for i in range(MASK + 1)))  # decoding is not what is tested
    found = decode(model, large, given, setting, max_new_tokens=NEW, batch_size=batch_size)
    assert found.tokens == [slowly(model, prompt.ids, NEW, setting.mode, threshold) for prompt in given]
    assert len(found.stats.rows) == 5


def test_outputs_end_at_the_end_of_text_and_text_has_no_special_tokens() -> None:
    model = model_of(eos_token_id=[1, 5, 9])
    found = decode(model, TOKENIZER, prompts(), SETTINGS[0], max_new_tokens=40, batch_size=4)
    assert any(len(tokens) < 40 for tokens in found.tokens)
    for tokens, text in zip(found.tokens, found.texts, strict=True):
        assert not {1, 5, 9} & set(tokens[:-1])
        assert len(tokens) == 40 or tokens[-1] in (1, 5, 9)
        assert text == "".join(ALPHABET[i - 3] for i in tokens if i >= 3)


@cache
def plain() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and samples of the model as it is, for all that compare with them."""
    return measure(model_of())


# --- Rows ---------------------------------------------------------------------------------------------------


def test_rows_have_every_field_and_make_a_report(tmp_path: Path) -> None:
    model = model_of(eos_token_id=None)
    rows, samples = measure(model)
    assert [(row["mode"], row["setting"]) for row in rows] == [(s.mode, s.name) for s in SETTINGS]
    for row, setting in zip(rows, SETTINGS, strict=True):
        assert row.keys() == FIELDS
        assert row["settings"] == {**setting.options, "batch_size": 32}
        assert row["prompts"] == 6
        assert row["tokens_out"] == 6 * NEW
        assert row["tokens_per_second"] > 0
        assert row["time_to_first_token"] > 0
        assert row["forwards"].keys() == {"prefill", "settle", "draft"}
        assert (row["acceptance"] is not None) == (row["mode"] == "speculative")
        assert (row["tokens_per_draft"] is None) == (row["mode"] in ("ar", "speculative"))
    given = document(rows, samples, model)
    check_results(given, "the rows")
    page = write_report(given, tmp_path)
    assert load_results(tmp_path / "results.json").plain()["acts"][0]["rows"] == json.loads(json.dumps(rows))
    assert page.exists() and (tmp_path / "frontier.png").stat().st_size > 1000


def test_figures_are_those_of_the_outputs() -> None:
    """Every figure once more, from the decoded outputs and plain Python."""
    model, given = model_of(), prompts()
    rows, samples = measure(model, batch_size=4)
    reference = decode(model, TOKENIZER, given, SETTINGS[0], max_new_tokens=NEW, batch_size=6)
    for row, setting in zip(rows, SETTINGS, strict=True):
        found: Outputs = decode(model, TOKENIZER, given, setting, max_new_tokens=NEW, batch_size=6)
        qualities = [edit_similarity(text, p.target) for text, p in zip(found.texts, given, strict=True)]
        assert row["quality"] == pytest.approx(sum(qualities) / 6)
        assert row["quality_standard_error"] == pytest.approx(statistics.stdev(qualities) / math.sqrt(6))
        pairs = [list(pairwise(tokens)) for tokens in found.tokens if len(tokens) > 1]
        assert row["distinct_2"] == pytest.approx(sum(len(set(p)) / len(p) for p in pairs) / len(pairs))
        same = [
            sum(a == b for a, b in zip(x, y, strict=False)) / max(len(x), len(y))
            for x, y in zip(found.tokens, reference.tokens, strict=True)
        ]
        assert row["agreement"] == pytest.approx(sum(same) / 6)
        assert row["tokens_out"] == sum(map(len, found.tokens))
        nats = 0.0
        for prompt, new in zip(given, found.tokens, strict=True):
            logits = model(torch.tensor([[*prompt.ids, *new]])).logits[0, len(prompt.ids) - 1 : -1].double()
            logits[:, model.config.mask_token_id] = -math.inf
            nats -= float(logits.log_softmax(-1)[range(len(new)), new].sum())
        assert row["ar_nats_per_token"] == pytest.approx(nats / row["tokens_out"])
        ledger = found.stats.rows
        gained = sum(r.tokens - r.free for r in ledger)
        assert row["tokens_per_forward"] == pytest.approx(gained / sum(r.settle + r.draft for r in ledger))
        assert [sample["outputs"][setting.name] for sample in samples] == found.texts
    assert [(sample["prompt"], sample["target"]) for sample in samples] == [(p.text, p.target) for p in given]


@pytest.mark.parametrize("fields", [{}, {"eos_token_id": [1, 5, 9]}, {"diffusion_prediction": "next"}], ids=str)
def test_the_histogram_of_steps_has_the_mean_tokens_per_forward(fields: dict[str, Any]) -> None:
    """And as many entries as there were forwards of a row: every token is in it once, and no forward is left out."""
    fused = Setting(name="fused", mode="speculative", options={"block_size": 4, "fused": True})
    unsure = Setting(name="unsure", mode="block", options={"block_size": 5, "reveal": "remdm", "steps_per_block": 3})
    rows, _ = measure(model_of(**fields), settings=(*SETTINGS, fused, unsure), batch_size=4)
    for row in rows:
        steps = {int(n): count for n, count in row["histograms"]["tokens_per_step"].items()}
        per = row["per_prompt"]
        assert sum(steps.values()) == sum(per["forwards"]), row["setting"]
        assert sum(n * count for n, count in steps.items()) == sum(per["new_tokens"]), row["setting"]
        rounds = {int(n): count for n, count in row["histograms"]["acceptance"].items()}
        assert bool(rounds) == (row["mode"] == "speculative")
        if rounds:
            mean = sum(n * count for n, count in rounds.items()) / sum(rounds.values())
            assert mean == pytest.approx(row["acceptance"])
    by_name = {row["setting"]: row["histograms"]["tokens_per_step"] for row in rows}
    assert by_name["one at a time"].keys() == {"1"}
    assert max(map(int, by_name["all at once"])) > 1


def test_figures_of_each_prompt_make_those_of_the_row() -> None:
    rows, _ = measure(model_of(eos_token_id=[1, 5, 9]), max_new_tokens=20)
    for row in rows:
        per = row["per_prompt"]
        assert statistics.mean(per["quality"]) == pytest.approx(row["quality"])
        assert sum(per["new_tokens"]) / sum(per["forwards"]) == pytest.approx(row["tokens_per_forward"])
    assert rows[0]["tokens_per_forward_standard_error"] == 0, "ar gains one token a forward in every prompt"
    assert rows[-1]["tokens_per_forward_standard_error"] > 0


def test_single_calls_are_timed_at_each_batch_size() -> None:
    rows, _ = measure(model_of(), latency_batch_sizes=(1, 3), repeats=2)
    for row in rows:
        calls = row["timing"]["latency"]
        assert [call["batch_size"] for call in calls] == [1, 3]
        assert all(call["same_tokens"] == 1.0 for call in calls), "the batch size changes no token"
        assert all(0 < call["time_to_first_token"]["low"] <= call["seconds"]["high"] for call in calls)
        assert row["timing"]["same_outputs"] == 1.0
        assert row["timing"]["peak_memory_bytes"] > 1 << 20


def test_a_speedup_is_the_median_of_turns_against_the_same_turn_of_ar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose speed drifts, too: every call of a turn takes the turn's number times what the mode takes."""
    turns: Counter[tuple[str, int]] = Counter()

    def slow(model: Any, tokenizer: Any, given: Any, setting: Setting, *, batch_size: int, **options: Any) -> Outputs:
        found = decode(model, tokenizer, given, setting, batch_size=batch_size, **options)
        turns[setting.name, batch_size] += 1
        turn = (turns[setting.name, batch_size] - 1) // (8 if batch_size == 1 else 1)
        one = {"one at a time": 4.0, "all at once": 1.0}.get(setting.name, 8.0)
        found.stats.seconds = 10**turn * one * sum(map(len, found.tokens))
        return found

    monkeypatch.setattr(hybrid.evals.passes.runs, "decode", slow)
    rows, _ = measure(model_of(), prompts=prompts(9), latency_batch_sizes=(1,), repeats=3, batch_size=9)
    found = {row["setting"]: (row["speedup"], row["throughput"]) for row in rows}
    for name, times in found.items():
        assert times == pytest.approx({"one at a time": (1, 1), "all at once": (4, 4)}.get(name, (0.5, 0.5)))
    rows, _ = measure(model_of(), repeats=1)
    assert all(row["speedup"] is None and row["throughput"] is not None for row in rows), "no single calls"
    rows, _ = measure(model_of(), settings=SETTINGS[1:], repeats=1, latency_batch_sizes=(1,))
    assert all(row["speedup"] is None and row["throughput"] is None for row in rows), "no ar"


def test_a_pass_that_writes_other_tokens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not deterministic must not pass for one that is."""
    calls = iter(range(100))

    def moody(*given: Any, **options: Any) -> Outputs:
        found = decode(*given, **options)
        if next(calls) == 3:  # the reference, the warm-up, a timed pass, and this one
            found.tokens[0][0] += 1
        return found

    monkeypatch.setattr(hybrid.evals.passes.runs, "decode", moody)
    rows, _ = measure(model_of(), settings=SETTINGS[:1], repeats=4)
    assert rows[0]["timing"]["same_outputs"] == 0.75
    (said,) = repeatability(check_results(document(rows, [], model_of()), "rows").acts[0])
    assert said == "one at a time (ar) wrote the tokens that were graded in only 75.0% of its 4 timed passes."


def test_a_damaged_record_of_the_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    model = model_of()
    first, _ = measure(model, settings=SETTINGS[:1], journal=Journal(path))
    again, _ = measure(model, settings=SETTINGS[:1], journal=Journal(path))
    assert again == first
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": "long", "was": ', 1))
    with pytest.raises(ValueError, match=r"the journal: the field \w+\.seconds is 'long'; it must be a number"):
        measure(model, settings=SETTINGS[:1], journal=Journal(path))


def test_the_reference_is_greedy_whatever_the_rows_do() -> None:
    greedy, _ = plain()
    rows, _ = measure(model_of(), do_sample=True, temperature=1.5)
    assert rows[0]["agreement"] < 1.0
    assert rows[0]["settings"]["do_sample"] is True
    assert "do_sample" not in greedy[0]["settings"]
    assert not breaks_promise(Row(**rows[0]))


def test_lossless_modes_agree_exactly_and_ar_gains_one_token_a_forward() -> None:
    others = (measure(model_of(**fields)) for fields in ({"eos_token_id": None}, {"diffusion_prediction": "next"}))
    for rows, _ in (plain(), *others):
        by_mode = {row["mode"]: row for row in rows}
        assert by_mode["ar"]["tokens_per_forward"] == 1.0
        for mode in ("ar", "speculative"):
            assert by_mode[mode]["lossless"] is True
            assert by_mode[mode]["agreement"] == 1.0
            assert by_mode[mode]["quality"] == by_mode["ar"]["quality"]
        assert by_mode["speculative"]["tokens_per_forward"] != 1.0
        for mode in ("block", "diffusion"):
            assert by_mode[mode]["lossless"] is False
    # The comparison can fail: a random model's blocks are not its left-to-right text.
    assert {row["agreement"] for row in rows if not row["lossless"]} != {1.0}


def test_the_reference_is_there_without_an_ar_row_and_only_where_ar_is() -> None:
    rows, _ = measure(model_of(), settings=SETTINGS[1:3])
    assert rows[0]["agreement"] == 1.0
    assert rows[1]["agreement"] is not None
    rows, samples = measure(model_of(clean_attention="full"), settings=SETTINGS[4:])
    assert rows[0]["agreement"] is None
    check_results(document(rows, samples, model_of()), "rows without a reference")


def test_an_exact_output_counts_as_exact() -> None:
    model, given = model_of(), prompts()
    found = decode(model, TOKENIZER, given, SETTINGS[0], max_new_tokens=NEW, batch_size=6)
    right = [
        Prompt(ids=p.ids, text=p.text, target=text if i in (0, 3) else "wrong")
        for i, (p, text) in enumerate(zip(given, found.texts, strict=True))
    ]
    rows, _ = measure(model, prompts=right, settings=SETTINGS[:1])
    assert rows[0]["exact"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_changes_no_quality(batch_size: int) -> None:
    """Nor any figure of speed that counts forwards of a row."""
    whole, samples = plain()
    parts, other = measure(model_of(), batch_size=batch_size)
    # Batched forwards, of which there are more, and the setting itself.
    assert untimed(parts, "forwards", "settings") == untimed(whole, "forwards", "settings")
    assert other == samples


def test_repeats_change_timings_only() -> None:
    told: list[Progress] = []
    one, samples = plain()
    three, other = measure(model_of(), repeats=3, batch_size=4, progress=told.append)
    assert untimed(one, "forwards", "settings") == untimed(three, "forwards", "settings")
    assert samples == other
    # In turn, so that a machine whose speed drifts is fair to all, after a pass that is not timed.
    order = [what for what, _ in groupby(map(str, told))]
    assert order == [REFERENCE_TOLD, *[f"{s.mode}: {s.name}" for s in SETTINGS] * 4, "grading the outputs"]
    assert told[-1].done == told[-1].total == 6 * (1 + 4 * len(SETTINGS))
    assert [now.done for now in told] == sorted(now.done for now in told)
    assert {now.total for now in told} == {told[-1].total}


def test_the_median_of_the_timings_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 50.0, 1.0, 9.0, 2.0])  # the reference and the warm-up, which no row reports, and three repeats

    def timed(*given: Any, **options: Any) -> Outputs:
        found, seconds = decode(*given, **options), next(clock)
        found.stats.seconds = seconds
        for row in found.stats.rows:
            row.queued, row.time_to_first_token = 1.0, 1.0 + seconds / 10
        return found

    monkeypatch.setattr(hybrid.evals.passes.runs, "decode", timed)
    rows, _ = measure(model_of(eos_token_id=None), settings=SETTINGS[1:2], repeats=3, batch_size=3)
    assert rows[0]["tokens_per_second"] == pytest.approx(6 * NEW / 2.0)
    assert rows[0]["time_to_first_token"] == pytest.approx(0.2)
    spread = rows[0]["timing"]["tokens_per_second"]
    assert (spread["low"], spread["high"]) == pytest.approx((6 * NEW / 9.0, 6 * NEW / 1.0))


def test_sampling_repeats_by_seed() -> None:
    def sampled(seed: int, batch_size: int = 32) -> Any:
        rows, samples = measure(model_of(), do_sample=True, temperature=1.5, seed=seed, batch_size=batch_size)
        return untimed(rows, "forwards", "settings"), samples

    once = sampled(0)
    assert once == sampled(0)
    assert once != sampled(1)
    assert once == sampled(0, batch_size=2), "each prompt has its own draws"


def test_one_new_token_has_no_speed_per_forward() -> None:
    rows, samples = measure(model_of(), max_new_tokens=1)
    for row in rows:
        assert row["tokens_per_forward"] is None
        assert row["distinct_2"] is None
    check_results(document(rows, samples, model_of()), "rows of one token")


def test_one_prompt_has_no_standard_error() -> None:
    rows, samples = measure(model_of(), prompts=prompts(1))
    assert all(row["quality_standard_error"] is None for row in rows)
    check_results(document(rows, samples, model_of()), "rows of one prompt")


def test_the_number_of_samples_is_as_asked() -> None:
    _, samples = measure(model_of(), samples=2, settings=SETTINGS[:2])
    assert len(samples) == 2
    assert samples[0]["outputs"].keys() == {s.name for s in SETTINGS[:2]}


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompts: there are none"):
        measure(model_of(), prompts=[])
    given = prompts()
    for number, (bad, message) in enumerate([
        (Prompt(ids=[], text="", target="x"), "number 1 is empty"),
        (Prompt(ids=[1, 0], text="", target="x"), "number 2 has the mask token"),
        (Prompt(ids=[1, 99], text="", target="x"), "number 3 has a token that the model lacks"),
        (Prompt(ids=[1] * 500, text="", target="x"), "number 4 has 500 tokens"),
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            measure(model_of(), prompts=[*given[:number], bad])
    with pytest.raises(ValueError, match="number 1 has no target"):
        frontier(
            model_of(), TOKENIZER, [Prompt(ids=[1], text="", target="")], SETTINGS, measures()["exact_match"],
            max_new_tokens=4,
        )  # fmt: skip
    with pytest.raises(ValueError, match="ar, one: block_size is the window"):
        measure(model_of(), settings=[Setting(name="one", mode="ar", options={"block_size": 3})])
    with pytest.raises(ValueError, match="settings: there are none"):
        measure(model_of(), settings=[])
    twice = (*SETTINGS, copy.copy(SETTINGS[0]))
    with pytest.raises(ValueError, match="settings: two have the same name"):
        measure(model_of(), settings=twice)


def test_the_environment_says_what_a_speed_depends_on() -> None:
    found = environment(tiny(0, dtype=torch.float32))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    assert all(found.values())
    json.dumps(found)


def test_outputs_that_nothing_can_be_said_of_have_no_speed_either() -> None:
    mute = Measure(
        name="mute", unit="", higher_is_better=True, description="none", targets=False,
        grade=lambda prompts, texts: Grades(values=[None] * len(texts)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="one at a time: all outputs are empty, so mute has nothing to grade"):
        frontier(model_of(), TOKENIZER, prompts(), SETTINGS[:1], mute, max_new_tokens=4, repeats=1)
