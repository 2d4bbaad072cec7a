"""`hybrid bench`: speed against what people use now, in one run on this machine."""


def bench(
    hidden_size: int = 256,
    layers: int = 6,
    vocab_size: int = 4096,
    prompt: int = 32,
    new_tokens: int = 64,
    block_size: int = 8,
    rounds: int = 7,
) -> None:
    """Time left-to-right decoding against transformers' `generate` with the same weights, batch 1, float32.

    The two take turns in one run, so that a machine whose speed drifts is fair to both; medians count. Beside it,
    what one forward of each kind costs, which is what tokens per forward must be paid for with. Random weights serve.

    Args:
        hidden_size: of the model.
        layers: of the model.
        vocab_size: of the model.
        prompt: tokens given.
        new_tokens: tokens asked for.
        block_size: window of the other modes.
        rounds: turns of each.
    """
    from rich.console import Console
    from rich.table import Table

    from hybrid.evals.bench import against_transformers, forward_costs, small_pair

    ours, theirs = small_pair(hidden_size, layers, vocab_size, block_size)
    console = Console()
    with console.status("taking turns"):
        found = against_transformers(ours, theirs, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
        costs = forward_costs(ours, past=256, rounds=max(rounds, 50))
    table = Table(title=f"{ours.num_parameters() / 1e6:.1f}M parameters, batch 1, float32, ms a token (median)")
    for heading in ("", "median", "least", "most"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in found.items():
        table.add_row(name, *(f"{t:.2f}" for t in times))
    console.print(table)
    ratio = found["transformers generate"][0] / found["hybrid, mode ar"][0]
    console.print(f"hybrid is {ratio:.2f} times as fast, with the same tokens.")
    table = Table(title="one forward over a cache of 256 (median)")
    for heading in ("slots", "ms", "of one slot's"):
        table.add_column(heading, justify="right")
    for slots, ms in costs.items():
        table.add_row(str(slots), f"{ms:.2f}", f"{ms / costs[1]:.2f}")
    console.print(table)
