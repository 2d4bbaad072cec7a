"""`hybrid generate PROMPTS --jsonl OUT`: a file of prompts in, a file of a model's own text out.

Lines are written as soon as they are done, each with the number of its prompt, and those that are there already are not
made again: the same command goes on where it was stopped. What a line says depends on its prompt, its number and the
seed, not on the batch it was in or on how often the job was stopped (in float32, up to ties).
"""

import json
import time
from pathlib import Path
from typing import Any

from hybrid import HybridForCausalLM
from hybrid.commands.console import Bar
from hybrid.common.files import BadLine, append, json_of, whole_lines
from hybrid.evals.prompts import Line, ids_of, read_prompts
from hybrid.noise import source_of
from hybrid.sampling import Request, decode
from hybrid.texts import Chat
from hybrid.texts import decode as text_of


def write_samples(
    prompts: Path, out: Path, model: HybridForCausalLM, tokenizer: Any, *,
    batch_size: int, seed: int, options: dict[str, Any],
) -> int:  # fmt: skip
    """Continue every prompt of a JSONL file; returns how many lines were written now.

    Args:
        prompts: a line each, `{"messages": [...]}` to be answered by the tokenizer's chat template, or
            `{"prompt": "..."}` to be continued as it stands.
        out: gets `{"line": n, "messages": [...]}` with the answer as last message, or `{"line": n, "text": "..."}`,
            and `"ended"`: whether the text came to its end within max_new_tokens. `TextData` trains on such files.
        options: of `generate`.

    Raises:
        ValueError: a line that is no prompt, named by its number, or `out` belongs to another list of prompts.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    asked = {line.number: line for line in read_prompts(prompts)}
    done = _done(out, asked)
    todo = {n: ids_of(asked[n], tokenizer) for n in asked if n not in done}
    order = list(todo)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Bar() as bar:
        task, tokens, begun = bar.begin("prompts", len(asked), len(done)), 0, time.perf_counter()
        requests = (Request(todo[n], generator=source_of(seed, n)) for n in order)
        for made in decode(model, requests, slots=batch_size, **options):
            if made.error is not None:
                raise made.error
            number = order[made.index]
            ended = len(made.tokens) < options["max_new_tokens"] or made.tokens[-1] in _ends(model)
            text = _answer(asked[number].said, text_of(tokenizer, made.tokens, after=todo[number]))
            append(out, json.dumps({"line": number, **text, "ended": ended}).encode())
            done, tokens = done | {number}, tokens + len(made.tokens)
            bar.tell(task, len(done), f"{tokens / (time.perf_counter() - begun):.0f} tokens/s")
    return len(order)


def _done(out: Path, asked: dict[int, Line]) -> set[int]:
    """Numbers of the lines that are there; a last line that was cut off while it was written is taken away."""
    done = set()
    for raw in whole_lines(out, cut=True):
        try:
            found = json_of(raw)
            said = asked[found["line"]].said
            begun = found["text"].startswith(said) if isinstance(said, str) else found["messages"][:-1] == said
        except (BadLine, TypeError, KeyError, AttributeError):
            begun = False
        if not begun:
            raise ValueError(f"jsonl: {out} holds something else than answers to these prompts; name another file.")
        done.add(found["line"])
    return done


def _ends(model: HybridForCausalLM) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = model.config.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _answer(said: str | Chat, text: str) -> dict[str, Any]:
    if isinstance(said, str):
        return {"text": said + text}
    return {"messages": [*said, {"role": "assistant", "content": text}]}
