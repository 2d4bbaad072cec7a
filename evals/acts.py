"""An act of the results document, measured: one model on one set of prompts, in every setting."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hybrid import HybridForCausalLM
from hybrid.evals.document import Act, Prompts
from hybrid.evals.frontier import frontier
from hybrid.evals.laboratory.aup import aup_of
from hybrid.evals.laboratory.traces import trace_of
from hybrid.evals.measures import Measure
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.evals.passes.runs import digest_of
from hybrid.evals.table import frontier_table, likelihood_table, takeaway


def act_of(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], settings: Sequence[Setting], measure: Measure,
    *, name: str, title: str, place: str, source: str, max_new_tokens: int, also: Sequence[Measure] = (), seed: int = 0,
    options: Mapping[str, Any], about: Mapping[str, Any], **passes: Any,
) -> Act | None:  # fmt: skip
    """The act, or None in a process that only helps another (`shards`).

    Args:
        measure, also: of quality: the one of the picture, and more of the same outputs.
        place: where the model is from.
        source: where the prompts are from.
        options: of `generate`, for all settings.
        about: more fields of the act, such as its notes.
        passes: more of `frontier`.
    """
    rows, samples = frontier(
        model, tokenizer, prompts, settings, measure, also=also, max_new_tokens=max_new_tokens, seed=seed, **passes,
        **options,
    )  # fmt: skip
    if not rows:
        return None
    asked = Prompts(
        count=len(prompts), sha256=digest_of(prompts), source=source, max_new_tokens=max_new_tokens, seed=seed
    )
    act = Act(
        name=name, title=title, quality=measure.record(), also=[other.record() for other in also], prompts=asked,
        model=about_model(model, place), rows=rows, samples=samples, **about,
    )  # fmt: skip
    trace = trace_of(model, tokenizer, prompts[0], act, max_new_tokens=max_new_tokens, seed=seed, **options)
    return act.model_copy(update={"aup": aup_of(act), "trace": trace})


def about_model(model: HybridForCausalLM, place: str) -> dict[str, Any]:
    """What the document says of a model."""
    fields = ("block_size", "clean_attention", "vocab_size", "diffusion_prediction")
    return {
        "path": place, "parameters": model.num_parameters(), **{name: getattr(model.config, name) for name in fields}
    }


def shown(act: Act) -> list[RenderableType]:
    """The act for a terminal: its tables, its notes and what it comes to."""
    tables = [frontier_table(act), *([likelihood_table(act.title, act.likelihood)] if act.likelihood else [])]
    return [*tables, *(Text(line) for line in (*(act.notes or []), takeaway(act)) if line)]
