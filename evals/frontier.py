"""The frontier: every mode and setting on the same prompts, each speed beside the quality of the same outputs."""

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from hybrid import HybridForCausalLM
from hybrid.evals.quality import agreement, distinct
from hybrid.sampling import GenerateOutput, GenerationStats

Score = Callable[[str, str, str], float]  # (prompt, output, target) -> quality in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out prompt.

    Attributes:
        ids: its tokens.
        text: the same as text.
        target: the true continuation.
    """

    ids: list[int]
    text: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to decode: a mode and its options of `generate`. `name` is unique within a sweep."""

    name: str
    mode: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether greedy output is left-to-right output by construction."""
        return self.mode in ("ar", "speculative")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a setting made of the prompts: new tokens and text of each, and the ledger of each batch."""

    tokens: list[list[int]]
    texts: list[str]
    stats: list[GenerationStats]


def decode(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], setting: Setting, *,
    max_new_tokens: int, batch_size: int, **options: Any,
) -> Outputs:  # fmt: skip
    """Continue every prompt."""
    tokens, stats = [], []
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        longest = max(len(prompt.ids) for prompt in batch)
        pad, device = tokenizer.pad_token_id or 0, model.device  # what is padding, the mask says
        ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in batch], device=device)
        out = model.generate(
            ids, attention_mask=mask, mode=setting.mode, max_new_tokens=max_new_tokens, return_dict_in_generate=True,
            **{**options, **setting.options},
        )  # fmt: skip
        assert isinstance(out, GenerateOutput) and out.sequences is not None and out.stats is not None
        stats.append(out.stats)
        tokens += [
            row[longest : longest + got.tokens].tolist()
            for row, got in zip(out.sequences, out.stats.rows, strict=True)
        ]
    return Outputs(tokens=tokens, texts=[tokenizer.decode(t, skip_special_tokens=True) for t in tokens], stats=stats)


def frontier(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], settings: Sequence[Setting], score: Score, *,
    max_new_tokens: int, batch_size: int = 32, repeats: int = 3, samples: int = 6,
    progress: Callable[[str], None] = lambda _: None, **options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Rows and samples for the results document.

    Greedy left-to-right decoding is the reference of `agreement`; it is run first, whether or not it is among the
    settings. Settings are timed in turn, `repeats` times over, and the median counts.

    Args:
        options: of `generate`, for all settings (`eos_token_id=...`).
        progress: told what is being run.

    Raises:
        ValueError: no prompts, or two settings of one name.
    """
    if not prompts:
        raise ValueError("prompts: there are none; give at least one held-out prompt.")
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if len({setting.name for setting in settings}) < len(settings):
        raise ValueError("settings: two have the same name; names tell rows apart.")

    def run(setting: Setting) -> Outputs:
        return decode(
            model, tokenizer, prompts, setting, max_new_tokens=max_new_tokens, batch_size=batch_size, **options
        )

    outputs: dict[str, Outputs] = {}
    seconds: dict[str, list[float]] = {setting.name: [] for setting in settings}
    first: dict[str, list[float]] = {setting.name: [] for setting in settings}
    reference = run(Setting(name="reference", mode="ar")) if model.config.clean_attention == "causal" else None
    for _ in range(repeats):
        for setting in settings:
            progress(f"{setting.mode}: {setting.name}")
            outputs[setting.name] = found = run(setting)
            seconds[setting.name].append(sum(s.seconds for s in found.stats))
            first[setting.name].append(statistics.median(s.time_to_first_token or math.nan for s in found.stats))
    rows = []
    for setting in settings:
        found = outputs[setting.name]
        took, began = statistics.median(seconds[setting.name]), statistics.median(first[setting.name])
        rows.append(_row(setting, found, prompts, score, reference, took, began, batch_size))
    shown = [
        {"prompt": p.text, "target": p.target, "outputs": {s.name: outputs[s.name].texts[i] for s in settings}}
        for i, p in enumerate(prompts[:samples])
    ]
    return rows, shown


def _row(
    setting: Setting, found: Outputs, prompts: Sequence[Prompt], score: Score, reference: Outputs | None,
    seconds: float, first_token: float, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    pairs = list(zip(prompts, found.texts, strict=True))
    qualities = [score(p.text, text, p.target) for p, text in pairs]
    repeats = [d for d in map(distinct, found.tokens) if d is not None]
    stats = found.stats
    ledger = GenerationStats(setting.mode, [row for s in stats for row in s.rows])
    for kind in ("prefill", "settle", "draft"):
        setattr(ledger, kind, sum(getattr(s, kind) for s in stats))
    same = None
    if reference is not None:
        pairs_of_tokens = zip(found.tokens, reference.tokens, strict=True)
        same = statistics.mean(agreement(*pair) for pair in pairs_of_tokens)
    return {
        "mode": setting.mode,
        "setting": setting.name,
        "settings": {**setting.options, "batch_size": batch_size},
        "quality": statistics.mean(qualities),
        "quality_standard_error": _standard_error(qualities),
        "exact": statistics.mean(text == p.target for p, text in pairs),
        "distinct_2": statistics.mean(repeats) if repeats else None,
        "agreement": same,
        "tokens_per_forward": ledger.tokens_per_forward,
        "tokens_per_draft": ledger.tokens_per_draft,
        "acceptance": ledger.acceptance,
        "tokens_per_second": ledger.tokens / seconds,
        "time_to_first_token": first_token,
        "forwards": {"prefill": ledger.prefill, "settle": ledger.settle, "draft": ledger.draft},
        "lossless": setting.lossless,
        "prompts": len(prompts),
        "tokens_out": ledger.tokens,
    }


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def environment(model: HybridForCausalLM) -> dict[str, Any]:
    """What a speed depends on, for the results document."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
