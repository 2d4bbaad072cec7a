"""`hybrid bench`: speed against what people use now, in turns of one run on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from hybrid import HybridForCausalLM


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model with random weights.

    Args:
        hidden_size: of the model.
        layers: of the model.
        vocab_size: of the model.
        block_size: window of the other modes.
    """

    hidden_size: int = 256
    layers: int = 6
    vocab_size: int = 4096
    block_size: int = 8


def decoding(size: Size = Size(), prompt: int = 32, new_tokens: int = 64, rounds: int = 7) -> None:
    """Time left-to-right decoding against transformers' `generate` with the same weights, batch 1.

    The two take turns in one run, so that a machine whose speed drifts is fair to both; medians count. Beside it,
    what one forward of each kind costs, in float32 and in bfloat16, which is what tokens per forward must be paid for
    with: with torch's products alone, and with the kernels that decoding chooses on this machine. Random weights serve.

    Example: `hybrid bench decoding --rounds 3`.

    Args:
        prompt: tokens given.
        new_tokens: tokens asked for.
        rounds: turns of each.
    """
    from rich.table import Table

    from hybrid.commands.console import wide_console
    from hybrid.evals.timing.bench import against_transformers, small_pair

    console = wide_console()
    ours, theirs = small_pair(size.hidden_size, size.layers, size.vocab_size, size.block_size)
    with console.status("taking turns"):
        found = against_transformers(ours, theirs, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    table = Table(title=f"{ours.num_parameters() / 1e6:.1f}M parameters, batch 1, float32, ms a token (median)")
    for heading in ("", "median", "least", "most"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in found.items():
        table.add_row(name, *(f"{t:.2f}" for t in times))
    console.print(table)
    ratio = found["transformers generate"][0] / found["hybrid, mode ar"][0]
    console.print(f"hybrid is {ratio:.2f} times as fast, with the same tokens.")
    return _forwards(console, ours, max(rounds, 30))


def load(count: int, size: Size = Size(), rounds: int = 7) -> None:
    """Time a ragged load: texts that come as others end, against one batch after the other.

    Prompts of 8 to 256 tokens with answers of 8 to 256, 16 at once, left to right, by a model with random weights:
    each taking the place of one that ended, which is how `decode` and the server work, against `generate` in batches.

    Example: `hybrid bench load 128 --rounds 1`.

    Args:
        count: texts.
        rounds: turns of each.
    """
    from rich.table import Table

    from hybrid.commands.console import wide_console
    from hybrid.evals.timing.bench import small_pair
    from hybrid.evals.timing.load import ragged_load

    console = wide_console()
    model, _ = small_pair(size.hidden_size, size.layers, size.vocab_size, size.block_size)
    with console.status("taking turns"):
        found = ragged_load(model, count=count, slots=16, rounds=rounds)
    table = Table(title=f"{count} texts of unequal lengths, 16 at once, {model.num_parameters() / 1e6:.1f}M parameters")
    for heading in ("", "tokens/s", "of generate's"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, speed in found.items():
        table.add_row(name, f"{speed:.0f}", f"{speed / found['generate']:.2f}")
    console.print(table)


def forwards(model: str, rounds: int = 7) -> None:
    """Time the forwards of a real model at every width that decoding has, and what chosen kernels save.

    Example: `hybrid bench forwards hybrid-stdlib`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        rounds: turns of each.
    """
    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load

    return _forwards(wide_console(), load(model), rounds)


# Slots of a forward, and what has forwards of this width.
FORWARDS = {
    1: "ar", 2: "ar, 2 texts", 4: "window 4", 5: "", 8: "window 8", 9: "", 16: "window 16", 20: "fused, window 4",
    32: "window 32", 72: "fused, window 8",
}  # fmt: skip


def _forwards(console: "Console", model: "HybridForCausalLM", rounds: int) -> None:
    import torch
    from rich.table import Table

    from hybrid.evals.timing.bench import forward_costs

    with console.status("taking turns"):
        costs = [
            forward_costs(model.to(dtype), past=256, rounds=rounds, slots=list(FORWARDS))
            for dtype in (torch.float32, torch.bfloat16)
        ]
    table = Table(title="one forward over a cache of 256 (median ms, and times that of one slot)")
    for heading in ("slots", "float32, plain", "chosen", "", "bfloat16, plain", "chosen", "", "what decodes so"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    for count, name in FORWARDS.items():
        cells = [
            cell for cost in costs for plain, chosen in [cost[count]]
            for cell in (f"{plain:.2f}", f"{chosen:.2f}", f"{chosen / cost[1][1]:.2f}")
        ]  # fmt: skip
        table.add_row(str(count), *cells, name)
    console.print(table)
    console.print(f"plain: torch's products; chosen: the kernels that were measured to be fastest here. {_machine()}")


def _machine() -> str:
    import torch

    from hybrid.fast.machine import cpu_name, instruction_sets

    threads = torch.get_num_threads()
    return f"{cpu_name()}, {' '.join(instruction_sets())}, {threads} thread{'s' * (threads > 1)}."


def speculation(
    model: str, prompts: Path, adapter: str | None = None, dtype: Literal["float32", "bfloat16"] | None = None,
    new_tokens: int = 64, block_size: int = 8, rounds: int = 7,
) -> None:  # fmt: skip
    """Time a real model that answers prompts greedily in every way that changes no token.

    With and without the drafts of --adapter, beside transformers' `generate` and its prompt lookup, in turns; medians.
    Then what these times are made of: a forward of several slots against one, and a token behind much text against one
    behind little. Drafts are as good as the text is easy, so the prompts are yours.

    Example: `hybrid bench speculation runs/smollm2 prompts.jsonl --adapter smollm2-drafter --block-size 4`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        prompts: JSONL file, a line each, with "messages" or "prompt".
        adapter: folder of a draft adapter (peft's format), or a shipped one.
        dtype: number format (default: the checkpoint's).
        new_tokens: tokens asked for.
        block_size: the window.
        rounds: turns of each.
    """
    from rich.table import Table

    from hybrid.adapters.draft_adapter import DraftAdapter
    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.prompts import ids_of, read_prompts
    from hybrid.evals.timing.speculation import measure

    loaded, tokenizer, console = load(model, dtype), load_tokenizer(model), wide_console()
    drafts = None if adapter is None else DraftAdapter.from_pretrained(adapter, loaded)
    asked = [ids_of(line, tokenizer) for line in read_prompts(prompts)]
    with console.status("taking turns"):
        found = measure(loaded, asked, drafts, new_tokens=new_tokens, window=block_size, rounds=rounds)
    table = Table(title=f"{model}: {len(asked)} prompts, {found[0].tokens} tokens, {str(loaded.dtype)[6:]}, batch 1")
    table.add_column("", no_wrap=True)
    for heading in ("kept per round", "tokens per forward", "tokens/s", "of ar's", "same as ar"):
        table.add_column(heading, justify="right")
    for way in found:
        figures = ["" if x is None else f"{x:.2f}" for x in (way.kept, way.tokens_per_forward)]
        speed, ratio = way.tokens_per_second, way.tokens_per_second / found[0].tokens_per_second
        table.add_row(way.name, *figures, f"{speed:.1f}", f"{ratio:.2f}", f"{way.same:.0%}")
    console.print(table)
    _made_of(console, loaded, max(rounds, 5))


def _made_of(console: "Console", model: "HybridForCausalLM", rounds: int) -> None:
    """Ratios on which speculation depends."""
    from rich.table import Table

    from hybrid.evals.timing.bench import context_costs, forward_costs

    short, long = (min(past, model.config.max_position_embeddings - 1) for past in (256, 2048))
    with console.status("taking turns"):
        forwards = forward_costs(model, past=min(short, long - 20), rounds=rounds, slots=(1, 5, 9, 20))
        tokens = context_costs(model, pasts=(short, long), rounds=rounds)
    table = Table(title="what that is made of (medians)")
    for heading in ("", "ms", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    one = forwards[1][1]
    for slots, (_, chosen) in forwards.items():
        name = "a forward of one slot" if slots == 1 else f"of {slots} slots"
        table.add_row(name, f"{chosen:.2f}", f"{chosen / one:.2f}")
    for past, each in tokens.items():
        table.add_row(f"a token behind {past:,}", f"{each:.2f}", f"{each / tokens[short]:.2f}")
    console.print(table)
    console.print(_machine())


def loading(folder: str, rounds: int = 7) -> None:
    """Time loading a folder against transformers' loading of the same weights; and what converting it takes in memory.

    Example: `hybrid bench loading runs/smollm2`.

    Args:
        folder: of a model that transformers loads too, or that `hybrid convert` made of one.
        rounds: turns of each.
    """
    import statistics

    from rich.table import Table

    from hybrid.commands.console import wide_console
    from hybrid.evals.timing.loading import loading as measure

    console = wide_console()
    with console.status("converting, then taking turns"):
        found = measure(folder, rounds)
    table = Table(title=f"loading {folder}, {found.weights / 1e6:,.0f} MB of weights (seconds)")
    for heading in ("", "median", "least", "most", "of transformers'"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, times in found.seconds.items():
        figures = (f"{pick(times):.3f}" for pick in (statistics.median, min, max))
        table.add_row(name, *figures, f"{found.ratio(name):.2f}")
    console.print(table)
    console.print(
        f"Converting it took {found.peak / 1e6:,.0f} MB of memory at once, {found.peak / found.weights:.2f} times its "
        f"weights, and {found.convert_seconds:.1f} seconds with starting Python."
    )


def calibrate(model: str, prompt: int = 32, new_tokens: int = 64, rounds: int = 7) -> None:
    """Time every mode of a trained model on this machine, and keep the result for mode="auto".

    Example: `hybrid bench calibrate hybrid-stdlib`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        prompt: tokens given.
        new_tokens: tokens asked for.
        rounds: turns of each.
    """
    from rich.table import Table

    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load
    from hybrid.evals.timing.calibrate import calibrate as measure
    from hybrid.evals.timing.calibrate import own_text
    from hybrid.sampling.options.auto import keep

    loaded, console = load(model), wide_console()
    with console.status("every mode takes its turns"):
        timings = measure(loaded, own_text(loaded, 16, prompt), new_tokens=new_tokens, rounds=rounds)
    path = keep(loaded, timings)
    table = Table(title=f"{model}: tokens a second (median), on text of its own")
    for heading in ("batch size", "mode", "options", "tokens/s", "of ar's"):
        table.add_column(heading, justify="right" if heading[0] in "bt" else "left")
    mode = timings[0].options["mode"]
    first = {t.batch_size: t.tokens_per_second for t in reversed(timings) if t.options["mode"] == mode}
    for t in timings:
        words = ", ".join(f"{k} {v}" for k, v in t.options.items() if k != "mode")
        ratio = t.tokens_per_second / first[t.batch_size]
        table.add_row(str(t.batch_size), t.options["mode"], words, f"{t.tokens_per_second:.0f}", f"{ratio:.2f}")
    console.print(table)
    console.print(f'Kept in {path}: generate(..., mode="auto") uses it.')
