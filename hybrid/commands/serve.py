"""`hybrid serve`: a model behind OpenAI's protocol, with a page on which its modes can be seen."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from hybrid.checkpoints.place import find
from hybrid.checkpoints.place import place as shipped_place
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import On
from hybrid.evals.timing.monitor import GenerationMonitor
from hybrid.law import Law
from hybrid.sampling import GenerationStats

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def serve(
    model: str,
    slots: int = 16,
    mode: Literal["ar", "block", "diffusion", "speculative", "auto"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    adapter: str | None = None,
    on: On = On(),
    api_key: str | None = None,
    cors: str | None = None,
    max_queue: int = 256,
    max_tokens: int | None = None,
    max_prompt: int | None = None,
    max_canvas: int | None = None,
    max_n: int = 16,
    max_seconds: float = 600.0,
    max_body: int = 2_097_152,
    grace: float = 30.0,
    log_text: bool = False,
    csv: Path | None = None,
    wandb: str | None = None,
) -> None:
    """Serve a model: OpenAI's protocol for tools, and a page at / on which the modes can be seen side by side.

    Point any client of OpenAI's at http://127.0.0.1:8000/v1, lm-eval's local-completions, or curl:
    `curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"model": "hybrid-stdlib", "prompt":
    "import os\\n", "hybrid": {"mode": "speculative"}}'`. It is the server of one machine: for many of them,
    `hybrid convert --to` hands a model over to vLLM or SGLang. Log lines are JSON, on the error stream. The first
    SIGTERM or Ctrl-C lets what is under way end, the second does not.

    Example: `hybrid serve hybrid-stdlib --port 8000`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        slots: texts decoded at once; others wait.
        mode: of requests that name none; "auto" is the fastest lossless one that `hybrid bench calibrate` measured.
        host: address to listen at; others than this machine's own should come with an --api-key.
        port: to listen at; 0 takes a free one and says which.
        name: of the model, for clients (default: the last part of MODEL).
        adapter: folder of a draft adapter (peft's format), active while drafting only.
        api_key: that clients must send (default: what the environment has as HYBRID_API_KEY, if anything).
        cors: origins, separated by commas, whose web pages may ask; none by default.
        max_queue: texts that may wait; more are answered with 429 and when to try again.
        max_tokens: new tokens of a text (default: 4096, or the context).
        max_prompt: tokens of a prompt (default: the context).
        max_canvas: new tokens of a text that is drafted in one window, as in "diffusion" (default: what memory allows).
        max_n: texts for one prompt.
        max_seconds: of a request, waiting included; what there is by then is the answer.
        max_body: bytes of a request.
        grace: seconds for what is under way when the server is told to end.
        log_text: write prompts and answers to the log, too.
        csv: append a line to this file for each text: its speed and latency.
        wandb: log the same to this wandb project, with percentiles.
    """
    try:
        from hybrid.sampling.serve.server import bound, is_loopback, log_to_stderr, server_of, service_of
    except ImportError as error:
        raise ValueError(f"{error}: install what serving needs with pip install 'hybrid-lm[serve]'.") from error

    counts = {
        "slots": slots, "max_queue": max_queue, "max_tokens": max_tokens, "max_prompt": max_prompt,
        "max_canvas": max_canvas, "max_n": max_n, "max_seconds": max_seconds, "max_body": max_body, "grace": grace,
    }  # fmt: skip
    for option, value in counts.items():
        least = 0 if option in ("max_queue", "grace") else 1
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; use {least} or more.")
    key = api_key if api_key is not None else os.environ.get("HYBRID_API_KEY")
    key = None if key is None else key.strip()  # one that was read from a file ends with its line
    if key == "":
        raise ValueError("--api-key is empty: give one, or leave it out.")
    limits = {
        "max_queue": max_queue, "n": max_n, "seconds": max_seconds, "body": max_body, "max_tokens": max_tokens,
        "prompt": max_prompt, "canvas": max_canvas,
    }  # fmt: skip
    with ExitStack() as over:
        place = over.enter_context(bound(host, port))
        loaded, where = load(model, on), shipped_place(model)
        tokenizer = load_tokenizer(model) if any(find(where, file, {}) for file in TOKENIZERS) else None
        service = service_of(
            loaded, tokenizer, name=name or Path(model).name, slots=slots, mode=mode, adapter=adapter,
            limits={k: v for k, v in limits.items() if v is not None}, api_key=key, log_text=log_text,
            loopback=is_loopback(host), finished=_monitor(csv, wandb, over),
        )  # fmt: skip
        _greet(service, host, place.getsockname()[1])
        log_to_stderr()
        origins = [origin.strip() for origin in (cors or "").split(",") if origin.strip()]
        server_of(service, grace=grace, cors=origins).run([place])


def _greet(service: Any, host: str, port: int) -> None:
    name = f"[{host}]" if ":" in host else host
    modes = ", ".join(Law.of(service.asks.model.config).modes)
    print(f"{service.name} ({modes}) at http://{name}:{port}/ — a page there, OpenAI's protocol at /v1.", flush=True)
    if service.decoder.session.stats.choice:
        print(f"mode auto: {service.decoder.session.stats.choice}", flush=True)
    if service.tokenizer is None:
        print("No tokenizer was found: prompts and answers are token ids.", flush=True)
    if service.api_key is None and not service.loopback:
        print("Anyone who reaches this address may ask: an --api-key keeps others out.", flush=True)


def _monitor(csv: Path | None, project: str | None, over: ExitStack) -> Callable[[Any, Any], None]:
    """What is told of each text, until it is over."""
    if csv is None and project is None:
        return lambda job, done: None

    run = None
    if project is not None:
        import wandb

        run = wandb.init(project=project, job_type="serve")
        over.callback(run.finish)
    monitor = GenerationMonitor(csv, run=run)
    over.callback(monitor.close)

    def finished(job: Any, done: Any) -> None:
        row = done.stats
        counts = {"prefill": row.prefill, "settle": row.settle, "draft": row.draft}
        first = row.time_to_first_token
        monitor.add(GenerationStats(job.mode, [row], **counts, time_to_first_token=first, seconds=row.seconds))

    return finished
