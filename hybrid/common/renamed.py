"""Old names of modules and arguments: they are taken for one version more, with a warning that says the new ones."""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar
from warnings import warn

P = ParamSpec("P")
R = TypeVar("R")

_MOVED = {
    "hybrid": {
        "adapters": "draft_head",
        "checkpoints": "card convert folder gguf_file place pretrained tensorfile",
        "common": "checks files lazy renamed",
        "fast": "costs flat kernels packs",
    },
    "hybrid.commands": {"eval": "benchmark ceiling compare frontier infill prompts tasks"},
    "hybrid.evals": {
        "benchmarks": "answers examine execution guard harness",
        "laboratory": "ablation aup ceiling compare infilling judge ngram oracle orders traces",
        "passes": "figures journal outputs runs shards",
        "timing": "bench calibrate load loading machine monitor speculation",
    },
    "hybrid.sampling": {
        "choosing": "accept borrowed choice draft",
        "display": "pieces slots watch",
        "options": "auto checks prompt settings",
        "schemes": "approximate guided in_flight shapes speculation",
    },
    "hybrid.training": {
        "tasks": "countdown gym prompts questions stdlib sudoku sudoku_solver",
        "laboratory": "ablation clip speed",
        "objectives": "cross_entropy curriculum drafter grpo rollouts",
        "running": "checkpoint precision processes randomness settings sharding start",
        "text": "chat documents rows token_cache tokenizing",
        "watching": "csv_log flops loss_by_noise noise_picture predictions samples showing throughput wandb_log",
    },
}  # fmt: skip
MOVED = {
    f"{package}.{name}": f"{package}.{folder}.{name}"
    for package, folders in _MOVED.items() for folder, names in folders.items() for name in names.split()
} | {
    "hybrid.commands.ablate": "hybrid.commands.recipes",
    "hybrid.commands.bench_server": "hybrid.commands.bench.server",
    "hybrid.commands.bench_training": "hybrid.commands.bench.training",
    "hybrid.commands.card": "hybrid.commands.checkpoints",
    "hybrid.commands.clip": "hybrid.commands.recipes",
    "hybrid.commands.convert": "hybrid.commands.checkpoints",
    "hybrid.commands.evaluate": "hybrid.commands.eval.likelihood",
    "hybrid.commands.info": "hybrid.commands.checkpoints",
    "hybrid.commands.ngram": "hybrid.commands.eval.likelihood",
    "hybrid.commands.texts": "hybrid.commands.eval.likelihood",
    "hybrid.evals.frontier": "hybrid.evals.acts",
    "hybrid.evals.markdown": "hybrid.evals.table",
    "hybrid.evals.quality": "hybrid.evals.measures",
    "hybrid.evals.tracking": "hybrid.evals.report",
    "hybrid.adapter": "hybrid.adapters.draft_adapter",
    "hybrid.attention": "hybrid.parts",
    "hybrid.delta": "hybrid.adapters.low_rank",
    "hybrid.shipped": "hybrid.checkpoints.place",
    "hybrid.machine": "hybrid.fast.costs",
    "hybrid.fast.machine": "hybrid.fast.costs",
    "hybrid.checkpoints.shipped": "hybrid.checkpoints.place",
    "hybrid.sampling.memory": "hybrid.sampling.places",
    "hybrid.sampling.serve.limits": "hybrid.sampling.serve.asks",
    "hybrid.training.lora": "hybrid.adapters.lora",
    "hybrid.training.ahead": "hybrid.training.running.innards",
    "hybrid.training.running.ahead": "hybrid.training.running.innards",
    "hybrid.training.running.in_use": "hybrid.training.objectives.rollouts",
    "hybrid.training.running.trainer": "hybrid.training.cli",
    "hybrid.training.trainer": "hybrid.training.cli",
}  # fmt: skip


class Renamed(MetaPathFinder, Loader):
    """Finds a module by the name that it had in 0.1."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an empty one, whose place the module itself takes

    def exec_module(self, module: ModuleType) -> None:
        now = MOVED[module.__name__]
        warn(f"{module.__name__} is {now} now; the old name goes with the next version.", DeprecationWarning, 2)
        sys.modules[module.__name__] = import_module(now)


def find_by_old_names() -> None:
    if not any(isinstance(finder, Renamed) for finder in sys.meta_path):
        sys.meta_path.append(Renamed())


def renamed_attribute(old: str, new: str) -> Any:
    """An attribute's old name: what it is called now is read, with a warning."""

    def read(owner: object) -> Any:
        warn(f"{type(owner).__name__}.{old} is {new} now; the old name goes with the next version.",
             DeprecationWarning, 2)  # fmt: skip
        return getattr(owner, new)

    return property(read)


def renamed_argument(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take its argument `new` by the name that it had."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def taking(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = kwargs
            if old in given:
                warn(f"{old} is {new} now; the old name goes with the next version.", DeprecationWarning, 2)
                given[new] = given.pop(old)
            return function(*args, **kwargs)

        return taking

    return decorate
