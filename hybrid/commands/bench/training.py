"""`hybrid bench training`: what a training step costs, in ratios of one run on this machine."""

import statistics
from pathlib import Path

import hybrid.training
from hybrid.commands.console import table, wide_console
from hybrid.commands.options import check_counts
from hybrid.evals.timing.bench import take_turns
from hybrid.training.laboratory.speed import run_job, step_profile


def training(recipe: Path | None = None, rounds: int = 7, steps: int = 20, profile: bool = False) -> None:
    """Time the training step of a recipe, against pure AR and against a plain loop.

    The steps take turns in one run, on the same batch, so that a machine whose speed drifts is fair to all; medians
    count. The recipe's own job runs first, for the share of time that it waits for data and for its peak memory.

    Example: `hybrid bench training --rounds 3`.

    Args:
        recipe: a YAML recipe with a joint objective (default: the laptop's, stdlib.yaml).
        rounds: turns of each step.
        steps: of the recipe's own job.
        profile: also print where a step's time goes, by operator.
    """
    check_counts(rounds=rounds, steps=steps)
    path = recipe or Path(hybrid.training.__path__[0]) / "recipes" / "stdlib.yaml"
    if not path.is_file():
        raise ValueError(f"recipe: there is no {path}, or it is a folder.")
    console = wide_console()
    with console.status("running the recipe's job"):
        joint = run_job(path, steps)
        if joint.objective.diffusion_weight == 0 or joint.objective.ar_weight == 0:
            raise ValueError(f"recipe: {path} does not train both ways; name a joint one, to compare with AR.")
        left_to_right = run_job(path, 1, "--model.objective.diffusion_weight=0", data=joint.data)
        plain = run_job(path, 1, "--trainer.precision=32-true", data=joint.data)
    with console.status("taking turns"):
        names = ("this recipe, joint", "this recipe, AR only", "plain float32 loop, joint")
        calls = (joint.step, left_to_right.step, plain.plain_step)
        seconds = take_turns(dict(zip(names, calls, strict=True)), rounds)
    size = f"{path.name}: {joint.model.num_parameters() / 1e6:.1f}M parameters, {joint.tokens} tokens a step"
    shown = table(size, "", "ms a step (median)", "least", "most", "tokens/s")
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        cells = (f"{1000 * t:.0f}" for t in (middle[name], min(times), max(times)))
        shown.add_row(name, *cells, f"{joint.tokens / middle[name]:.0f}")
    console.print(shown)
    ours, ar, slow = (middle[name] for name in names)
    console.print(
        f"A joint step costs {ours / ar:.2f} times a pure AR step on the same tokens.\n"
        f"The recipe is {slow / ours:.2f} times as fast as the plain loop (float32, nothing compiled, one dense mask, "
        f"all logits).\nWaiting for data: {joint.waiting:.1%} of the job's time. "
        f"Peak memory of its process: {joint.peak_memory / 2**20:,.0f} MiB."
    )
    if profile:
        print(step_profile(joint.step, joint.device))
