"""`hybrid bench`: speed against what people use now, in turns of one run on this machine."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid import HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.commands.console import table, wide_console
from hybrid.commands.models import load as load_model
from hybrid.commands.models import load_tokenizer, place_of
from hybrid.commands.options import On, check_counts
from hybrid.evals.prompts import ids_of, read_prompts
from hybrid.evals.timing.bench import against_transformers, context_costs, forward_costs, small_pair
from hybrid.evals.timing.calibrate import calibrate as time_modes
from hybrid.evals.timing.calibrate import own_text
from hybrid.evals.timing.load import ragged_load
from hybrid.evals.timing.loading import loading as time_loading
from hybrid.evals.timing.speculation import measure
from hybrid.fast.costs import cpu_name, instruction_sets
from hybrid.sampling.options.auto import keep


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
    check_counts(prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    console = wide_console()
    ours, theirs = small_pair(size.hidden_size, size.layers, size.vocab_size, size.block_size)
    with console.status("taking turns"):
        found = against_transformers(ours, theirs, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    title = f"{ours.num_parameters() / 1e6:.1f}M parameters, batch 1, float32, ms a token (median)"
    rows = ([name, *(f"{t:.2f}" for t in times)] for name, times in found.items())
    console.print(table(title, "", "median", "least", "most", rows=rows))
    ratio = found["transformers generate"][0] / found["hybrid, mode ar"][0]
    console.print(f"hybrid is {ratio:.2f} times as fast, with the same tokens.")
    _forwards(ours, max(rounds, 30))


def load(count: int, size: Size = Size(), rounds: int = 7) -> None:
    """Time a ragged load: texts that come as others end, against one batch after the other.

    Prompts of 8 to 256 tokens with answers of 8 to 256, 16 at once, left to right, by a model with random weights:
    each taking the place of one that ended, which is how `decode` and the server work, against `generate` in batches.

    Example: `hybrid bench load 128 --rounds 1`.

    Args:
        count: texts.
        rounds: turns of each.
    """
    check_counts(count=count, rounds=rounds)
    console = wide_console()
    model, _ = small_pair(size.hidden_size, size.layers, size.vocab_size, size.block_size)
    with console.status("taking turns"):
        found = ragged_load(model, count=count, slots=16, rounds=rounds)
    title = f"{count} texts of unequal lengths, 16 at once, {model.num_parameters() / 1e6:.1f}M parameters"
    rows = ([name, f"{speed:.0f}", f"{speed / found['generate']:.2f}"] for name, speed in found.items())
    console.print(table(title, "", "tokens/s", "of generate's", rows=rows))


def forwards(model: str, rounds: int = 7) -> None:
    """Time the forwards of a real model at every width that decoding has, and what chosen kernels save.

    Example: `hybrid bench forwards hybrid-stdlib`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        rounds: turns of each.
    """
    _forwards(load_model(model), rounds)


# Slots of a forward, and what has forwards of this width.
FORWARDS = {
    1: "ar", 2: "ar, 2 texts", 4: "window 4", 5: "", 8: "window 8", 9: "", 16: "window 16", 20: "fused, window 4",
    32: "window 32", 72: "fused, window 8",
}  # fmt: skip


def _forwards(model: HybridForCausalLM, rounds: int) -> None:
    console = wide_console()
    with console.status("taking turns"):
        costs = [
            forward_costs(model.to(dtype), past=256, rounds=rounds, slots=list(FORWARDS))
            for dtype in (torch.float32, torch.bfloat16)
        ]
    shown = table(
        "one forward over a cache of 256 (median ms, and times that of one slot)",
        "slots", "float32, plain", "chosen", "", "bfloat16, plain", "chosen", "", "what decodes so", words=0,
    )  # fmt: skip
    shown.columns[-1].justify = "left"
    for count, name in FORWARDS.items():
        cells = [
            cell for cost in costs for plain, chosen in [cost[count]]
            for cell in (f"{plain:.2f}", f"{chosen:.2f}", f"{chosen / cost[1][1]:.2f}")
        ]  # fmt: skip
        shown.add_row(str(count), *cells, name)
    console.print(shown)
    console.print(f"plain: torch's products; chosen: the kernels that were measured to be fastest here. {_machine()}")


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {' '.join(instruction_sets())}, {threads} thread{'s' * (threads > 1)}."


def speculation(
    model: str,
    prompts: Path,
    adapter: str | None = None,
    new_tokens: int = 64,
    block_size: int = 8,
    rounds: int = 7,
    on: On = On(),
) -> None:
    """Time a real model that answers prompts greedily in every way that changes no token.

    With and without the drafts of --adapter, beside transformers' `generate` and its prompt lookup, in turns; medians.
    Then what these times are made of: a forward of several slots against one, and a token behind much text against one
    behind little. Drafts are as good as the text is easy, so the prompts are yours.

    Example: `hybrid bench speculation runs/smollm2 prompts.jsonl --adapter smollm2-drafter --block-size 4`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        prompts: JSONL file, a line each, with "messages" or "prompt".
        adapter: folder of a draft adapter (peft's format), or a shipped one.
        new_tokens: tokens asked for.
        block_size: the window.
        rounds: turns of each.
    """
    check_counts(new_tokens=new_tokens, block_size=block_size, rounds=rounds)
    loaded, tokenizer, console = load_model(model, on), load_tokenizer(model), wide_console()
    drafts = None if adapter is None else DraftAdapter.from_pretrained(adapter, loaded)
    asked = [ids_of(line, tokenizer) for line in read_prompts(prompts)]
    with console.status("taking turns"):
        found = measure(loaded, asked, drafts, new_tokens=new_tokens, window=block_size, rounds=rounds)
    shown = table(
        f"{model}: {len(asked)} prompts, {found[0].tokens} tokens, {str(loaded.dtype)[6:]}, batch 1",
        "", "kept per round", "tokens per forward", "tokens/s", "of ar's", "same as ar",
    )  # fmt: skip
    shown.columns[0].no_wrap = True
    for way in found:
        figures = ["" if x is None else f"{x:.2f}" for x in (way.kept, way.tokens_per_forward)]
        speed, ratio = way.tokens_per_second, way.tokens_per_second / found[0].tokens_per_second
        shown.add_row(way.name, *figures, f"{speed:.1f}", f"{ratio:.2f}", f"{way.same:.0%}")
    console.print(shown)
    _made_of(loaded, max(rounds, 5))


def _made_of(model: HybridForCausalLM, rounds: int) -> None:
    """Ratios on which speculation depends."""
    console = wide_console()
    short, long = (min(past, model.config.max_position_embeddings - 1) for past in (256, 2048))
    with console.status("taking turns"):
        forwards = forward_costs(model, past=min(short, long - 20), rounds=rounds, slots=(1, 5, 9, 20))
        tokens = context_costs(model, pasts=(short, long), rounds=rounds)
    names = {slots: f"of {slots} slots" for slots in forwards} | {1: "a forward of one slot"}
    times = [(names[slots], chosen, forwards[1][1]) for slots, (_, chosen) in forwards.items()]
    times += [(f"a token behind {past:,}", each, tokens[short]) for past, each in tokens.items()]
    rows = ([name, f"{each:.2f}", f"{each / one:.2f}"] for name, each, one in times)
    console.print(table("what that is made of (medians)", "", "ms", "ratio", rows=rows), _machine())


def loading(folder: str, rounds: int = 7) -> None:
    """Time loading a folder against transformers' loading of the same weights; and what converting it takes in memory.

    Example: `hybrid bench loading runs/smollm2`.

    Args:
        folder: of a model that transformers loads too, or that `hybrid convert` made of one.
        rounds: turns of each.
    """
    check_counts(rounds=rounds)
    console = wide_console()
    with console.status("converting, then taking turns"):
        found = time_loading(place_of(folder), rounds)
    title = f"loading {folder}, {found.weights / 1e6:,.0f} MB of weights (seconds)"
    shown = table(title, "", "median", "least", "most", "of transformers'")
    for name, times in found.seconds.items():
        figures = (f"{pick(times):.3f}" for pick in (statistics.median, min, max))
        shown.add_row(name, *figures, f"{found.ratio(name):.2f}")
    console.print(shown)
    console.print(
        f"Converting it took {found.peak / 1e6:,.0f} MB of memory at once, {found.peak / found.weights:.2f} times its "
        f"weights, and {found.convert_seconds:.1f} seconds with starting Python."
    )


def calibrate(model: str, prompt: int = 32, new_tokens: int = 64, rounds: int = 7, on: On = On()) -> None:
    """Time every mode of a trained model on this machine, and keep the result for mode="auto".

    Example: `hybrid bench calibrate hybrid-stdlib`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        prompt: tokens given.
        new_tokens: tokens asked for.
        rounds: turns of each.
    """
    check_counts(prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    loaded, console = load_model(model, on), wide_console()
    with console.status("every mode takes its turns"):
        timings = time_modes(loaded, own_text(loaded, 16, prompt), new_tokens=new_tokens, rounds=rounds)
    path = keep(loaded, timings)
    title = f"{model}: tokens a second (median), on text of its own"
    shown = table(title, "batch size", "mode", "options", "tokens/s", "of ar's", words=3)
    mode = timings[0].options["mode"]
    first = {t.batch_size: t.tokens_per_second for t in reversed(timings) if t.options["mode"] == mode}
    for t in timings:
        words = ", ".join(f"{k} {v}" for k, v in t.options.items() if k != "mode")
        ratio = t.tokens_per_second / first[t.batch_size]
        shown.add_row(str(t.batch_size), t.options["mode"], words, f"{t.tokens_per_second:.0f}", f"{ratio:.2f}")
    console.print(shown)
    console.print(f'Kept in {path}: generate(..., mode="auto") uses it.')
