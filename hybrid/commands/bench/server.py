"""`hybrid bench server`: a server of OpenAI's protocol, as its clients see it."""

from hybrid.commands.console import cell, table, wide_console
from hybrid.evals.timing.serving import Client, load, percentile


def server(
    url: str,
    clients: str = "1,4,16",
    answers: int | None = None,
    new_tokens: int = 64,
    long_prompts: int = 0,
    api_key: str | None = None,
) -> None:
    """Time a server of OpenAI's protocol, `hybrid serve` or another, by streamed chats, or texts to be continued where
    its model has no chat.

    Example: `hybrid bench server http://127.0.0.1:8000 --clients 1,4,16`.

    Args:
        url: its address, as http://127.0.0.1:8000.
        clients: at once, each waiting for its answer before it asks again; several numbers are taken in turn.
        answers: for each of these numbers (default: 4 a client, 8 at least).
        new_tokens: of an answer, at most.
        long_prompts: one more client asks meanwhile with prompts of about so many tokens, which are not counted: what
            do they do to the time to first token of the others?
        api_key: that the server asks for.
    """
    try:
        counts = [int(word) for word in clients.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--clients is {clients!r}; give numbers of clients, as 1,4,16.")
    for name, value in (("--answers", answers), ("--new-tokens", new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more.")
    console, model = wide_console(), Client(url, api_key).model()
    beside = f", beside one with prompts of about {long_prompts} tokens" if long_prompts else ""
    headings = "clients", "answers", "tokens", "tokens/s", "first token (ms)", "p95", "between pieces (ms)", "p95"
    shown = table(f"{url}: {model}, answers of up to {new_tokens} tokens{beside}", *headings, words=0)
    chat = True
    try:
        load(url, model=model, clients=1, count=1, new_tokens=4, key=api_key)  # what is made once is made
    except ValueError:
        chat = False
        load(url, model=model, clients=1, count=1, new_tokens=4, key=api_key, chat=False)
    for number in counts:
        count = answers or max(8, 4 * number)
        with console.status(f"{number} at once"):
            seen = load(
                url, model=model, clients=number, count=count, new_tokens=new_tokens, long=long_prompts, key=api_key,
                chat=chat,
            )  # fmt: skip
        times = [percentile(values, share) for values in (seen.first, seen.gaps) for share in (0.5, 0.95)]
        cells = (cell(None if t is None else 1000 * t, ".0f") for t in times)
        shown.add_row(str(number), str(count), str(seen.tokens), f"{seen.speed:.1f}", *cells)
    console.print(shown)
