"""`hybrid bench decoding`: speed against what people use now, in one run on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from hybrid import HybridForCausalLM


def bench(
    hidden_size: int = 256,
    layers: int = 6,
    vocab_size: int = 4096,
    prompt: int = 32,
    new_tokens: int = 64,
    block_size: int = 8,
    rounds: int = 7,
    calibrate: str | None = None,
    speculation: str | None = None,
    adapter: str | None = None,
    prompts: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    loading: str | None = None,
    load: int | None = None,
    forwards: str | None = None,
    server: str | None = None,
    clients: str = "1,4,16",
    answers: int | None = None,
    long_prompts: int = 0,
    api_key: str | None = None,
) -> None:
    """Time left-to-right decoding against transformers' `generate` with the same weights, batch 1.

    The two take turns in one run, so that a machine whose speed drifts is fair to both; medians count. Beside it,
    what one forward of each kind costs, in float32 and in bfloat16, which is what tokens per forward must be paid for
    with: with torch's products alone, and with the kernels that decoding chooses on this machine. Random weights serve.
    With --forwards, it is the forwards of a real model. With --calibrate, every mode of a trained model is timed
    instead, and the result is kept for mode="auto". With --loading, loading a folder of ours is timed against
    transformers' loading of the same weights, and converting it says what it took in memory. With --speculation, a real
    model answers --prompts greedily in every way that changes no token, with and without the drafts of --adapter,
    beside transformers' `generate` and its prompt lookup; medians of --rounds turns each. Then what these times are
    made of: a forward of several slots against one, and a token behind much text against one behind little.

    Example: `hybrid bench decoding --rounds 3` or `hybrid bench --load 128`.

    Args:
        hidden_size: of the model.
        layers: of the model.
        vocab_size: of the model.
        prompt: tokens given.
        new_tokens: tokens asked for.
        block_size: window of the other modes.
        rounds: turns of each.
        calibrate: folder or hub name of the model to measure for mode="auto" on this machine.
        speculation: folder or hub name of the model whose speculation is measured, in windows of --block-size.
        adapter: folder of its draft adapter (peft's format).
        prompts: JSONL file of prompts, a line each, with "messages" or "prompt".
        dtype: number format of --speculation (default: the checkpoint's).
        loading: folder of the model to load, and to convert, instead.
        load: so many prompts of 8 to 256 tokens with answers of 8 to 256 instead, 16 at once, decoded left to right: as
            they come, each taking the place of one that ended, against one batch after the other.
        forwards: folder or hub name of the model whose forwards are timed instead.
        server: address of a server of OpenAI's protocol, `hybrid serve` or another, whose chat is timed instead, with
            answers of --new-tokens.
        clients: of --server, at once; several numbers are taken one after another.
        answers: of --server, for each of these (default: 4 a client, 8 at least).
        long_prompts: of --server: one more client asks meanwhile with prompts of about so many tokens.
        api_key: of --server.
    """
    from rich.table import Table

    from hybrid.commands.console import wide_console
    from hybrid.evals.timing.bench import against_transformers, small_pair

    console = wide_console()
    if server is not None:
        return _server(console, server, clients, answers, new_tokens, long_prompts, api_key)
    if speculation is not None:
        if prompts is None:
            raise ValueError("--prompts is missing: drafts are as good as the text is easy; give a JSONL file of them.")
        return _speculation(console, speculation, adapter, prompts, dtype, new_tokens, block_size, rounds)
    for name, value in (("--adapter", adapter), ("--prompts", prompts), ("--dtype", dtype)):
        if value is not None:
            raise ValueError(f"{name} goes with --speculation.")
    if forwards is not None:
        from hybrid import HybridForCausalLM

        return _forwards(console, HybridForCausalLM.from_pretrained(forwards).eval(), rounds)
    if loading is not None:
        return _loading(console, loading, rounds)
    if calibrate is not None:
        return _calibrate(console, calibrate, prompt, new_tokens, rounds)
    ours, theirs = small_pair(hidden_size, layers, vocab_size, block_size)
    if load is not None:
        return _load(console, ours, load, rounds)
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


def _server(
    console: "Console", url: str, clients: str, answers: int | None, new_tokens: int, long: int, key: str | None
) -> None:
    from rich.table import Table

    from hybrid.evals.timing.serving import Client, load, median, percentile

    try:
        counts = [int(word) for word in clients.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--clients is {clients!r}; give numbers of clients, as 1,4,16.")
    model = Client(url, key).model()
    beside = f", beside one with prompts of about {long} tokens" if long else ""
    table = Table(title=f"{url}: {model}, answers of up to {new_tokens} tokens{beside}", title_justify="left")
    headings = "clients", "answers", "tokens", "tokens/s", "first token (ms)", "p95", "between pieces (ms)", "p95"
    for heading in headings:
        table.add_column(heading, justify="right")
    load(url, model=model, clients=1, count=1, new_tokens=4, key=key)  # what is made once is made
    for number in counts:
        count = answers or max(8, 4 * number)
        with console.status(f"{number} at once"):
            seen = load(
                url, model=model, clients=number, count=count, new_tokens=new_tokens, long=long, key=key
            )
        times = (median(seen.first), percentile(seen.first, 0.95), median(seen.gaps), percentile(seen.gaps, 0.95))
        shown = ["–" if t is None else f"{1000 * t:.0f}" for t in times]
        table.add_row(str(number), str(count), str(seen.tokens), f"{seen.speed:.1f}", *shown)
    console.print(table)


def _load(console: "Console", model: "HybridForCausalLM", count: int, rounds: int) -> None:
    from rich.table import Table

    from hybrid.evals.timing.load import ragged_load

    with console.status("taking turns"):
        found = ragged_load(model, count=count, slots=16, rounds=rounds)
    table = Table(title=f"{count} texts of unequal lengths, 16 at once, {model.num_parameters() / 1e6:.1f}M parameters")
    for heading in ("", "tokens/s", "of generate's"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, speed in found.items():
        table.add_row(name, f"{speed:.0f}", f"{speed / found['generate']:.2f}")
    console.print(table)


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


def _speculation(
    console: "Console", name: str, adapter: str | None, prompts: str, dtype: str | None, new_tokens: int, window: int,
    rounds: int,
) -> None:  # fmt: skip
    from rich.table import Table

    from hybrid.adapter import DraftAdapter
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.prompts import ids_of, read_prompts
    from hybrid.evals.timing.speculation import measure

    model, tokenizer = load(name, dtype), load_tokenizer(name)
    drafts = None if adapter is None else DraftAdapter.from_pretrained(adapter, model)
    asked = [ids_of(line, tokenizer) for line in read_prompts(Path(prompts))]
    with console.status("taking turns"):
        found = measure(model, asked, drafts, new_tokens=new_tokens, window=window, rounds=rounds)
    table = Table(title=f"{name}: {len(asked)} prompts, {found[0].tokens} tokens, {str(model.dtype)[6:]}, batch 1")
    table.add_column("", no_wrap=True)
    for heading in ("kept per round", "tokens per forward", "tokens/s", "of ar's", "same as ar"):
        table.add_column(heading, justify="right")
    for way in found:
        figures = ["" if x is None else f"{x:.2f}" for x in (way.kept, way.tokens_per_forward)]
        speed, ratio = way.tokens_per_second, way.tokens_per_second / found[0].tokens_per_second
        table.add_row(way.name, *figures, f"{speed:.1f}", f"{ratio:.2f}", f"{way.same:.0%}")
    console.print(table)
    _made_of(console, model, max(rounds, 5))


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


def _loading(console: "Console", folder: str, rounds: int) -> None:
    import statistics

    from rich.table import Table

    from hybrid.evals.timing.loading import loading

    with console.status("converting, then taking turns"):
        found = loading(folder, rounds)
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


def _calibrate(console: "Console", name: str, prompt: int, new_tokens: int, rounds: int) -> None:
    from rich.table import Table

    from hybrid import HybridForCausalLM
    from hybrid.evals.timing.calibrate import calibrate, own_text
    from hybrid.sampling.options.auto import keep

    model = HybridForCausalLM.from_pretrained(name).eval()
    with console.status("every mode takes its turns"):
        timings = calibrate(model, own_text(model, 16, prompt), new_tokens=new_tokens, rounds=rounds)
    path = keep(model, timings)
    table = Table(title=f"{name}: tokens a second (median), on text of its own")
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
