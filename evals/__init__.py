"""Likelihood, quality, speed, the frontier and its report.

Names are looked up when they are first used: transformers and matplotlib take seconds to import, and not everything
here needs them.
"""
# ruff: noqa: F401 (the imports are for those who read types)

from typing import TYPE_CHECKING

from hybrid.common.lazy import names_of

# None may be the old name of a module (`frontier`, `compare`, `aup`): whoever imports that puts it in its place.
if TYPE_CHECKING:
    from hybrid.evals.acts import act_of
    from hybrid.evals.document import Act, Quality, Results, Row
    from hybrid.evals.laboratory.aup import aup_of
    from hybrid.evals.laboratory.compare import Comparison
    from hybrid.evals.laboratory.traces import Trace, write_trace
    from hybrid.evals.likelihood import Likelihood, Text, ar_nll, bound, score, tokenized, written_nll
    from hybrid.evals.measures import Grades, Measure, judged, scored
    from hybrid.evals.passes.outputs import Prompt, Setting
    from hybrid.evals.picture import frontier_picture
    from hybrid.evals.prompts import load_prompts
    from hybrid.evals.report import write_report
    from hybrid.evals.results import check_results, document_of, load_results
    from hybrid.evals.sweep import Sweep, load_sweep
    from hybrid.evals.table import frontier_table
    from hybrid.evals.timing.monitor import GenerationMonitor

__getattr__, __all__ = names_of(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
