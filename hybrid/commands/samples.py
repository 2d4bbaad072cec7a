"""`hybrid generate PROMPTS --jsonl OUT`: a file of prompts in, a file of a model's own text out.

Lines are written as soon as they are done, each with the number of its prompt, and those that are there already are not
made again: the same command goes on where it was stopped. What a line says depends on its prompt, its number and the
seed, not on the batch it was in or on how often the job was stopped (in float32, up to ties).
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.commands.console import Bar
from hybrid.sampling import Request, decode
from hybrid.texts import chat_text, encode
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
    asked = read_prompts(prompts)
    done = _done(out, asked)
    todo = {n: prompt_ids(asked[n], n, prompts, tokenizer) for n in asked if n not in done}
    order = list(todo)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, Bar() as bar:
        task, tokens, begun = bar.begin("prompts", len(asked), len(done)), 0, time.perf_counter()
        requests = (Request(todo[n], generator=_source(seed, n)) for n in order)
        for made in decode(model, requests, slots=batch_size, **options):
            if made.error is not None:
                raise made.error
            number = order[made.index]
            ended = len(made.tokens) < options["max_new_tokens"] or made.tokens[-1] in _ends(model)
            text = _answer(asked[number], text_of(tokenizer, made.tokens, after=todo[number]))
            file.write(json.dumps({"line": number, **text, "ended": ended}) + "\n")
            file.flush()
            done, tokens = done | {number}, tokens + len(made.tokens)
            bar.tell(task, len(done), f"{tokens / (time.perf_counter() - begun):.0f} tokens/s")
    return len(order)


def read_prompts(path: Path) -> dict[int, dict[str, Any]]:
    """The prompts of a JSONL file, by the numbers of their lines: `{"messages": [...]}` or `{"prompt": "..."}`.

    Raises:
        ValueError: there is no such file, or a line is no prompt.
    """
    if not path.is_file():
        raise ValueError(f"prompts: there is no file {path}; it has a prompt a line, as JSON.")
    lines = enumerate(path.read_text().splitlines(), 1)
    return {number: _read(line, number, path) for number, line in lines if line.strip()}


def _read(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON ({error.msg}).") from error
    messages, prompt = (found.get(k) if isinstance(found, dict) else None for k in ("messages", "prompt"))
    if isinstance(prompt, str) and prompt and messages is None:
        return {"prompt": prompt}
    if isinstance(messages, list) and messages and prompt is None and all(isinstance(m, dict) for m in messages):
        return {"messages": messages}
    raise ValueError(f'{path} line {number} has neither "messages" (a list) nor "prompt" (a text).')


def _done(out: Path, asked: dict[int, dict[str, Any]]) -> set[int]:
    """Numbers of the lines that are there; a last line that was cut off while it was written is taken away."""
    if not out.exists():
        return set()
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        out.write_bytes(whole)
    done = set()
    for line in whole.decode().splitlines():
        try:
            found = json.loads(line)
            number, prompt = found["line"], asked[found["line"]]
        except (json.JSONDecodeError, TypeError, KeyError):
            number, prompt, found = 0, {}, {}
        same = found.get("messages", [])[:-1] == prompt.get("messages", []) and str(found.get("text", "")).startswith(
            prompt.get("prompt", "")
        )
        if not number or not same:
            raise ValueError(f"jsonl: {out} holds something else than answers to these prompts; name another file.")
        done.add(number)
    return done


def prompt_ids(prompt: dict[str, Any], number: int, path: Path, tokenizer: Any) -> list[int]:
    """Token ids of one prompt: a chat in its template with the answer about to begin, or a text from its beginning.

    Raises:
        ValueError: the tokenizer cannot write it, or has no chat template; the line is named.
    """
    where = f"{path} line {number}"
    text = prompt["prompt"] if "prompt" in prompt else chat_text(tokenizer, prompt["messages"], where)
    return encode(tokenizer, text, where)


def _source(seed: int, number: int) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def _ends(model: HybridForCausalLM) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = model.config.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _answer(prompt: dict[str, Any], text: str) -> dict[str, Any]:
    if "prompt" in prompt:
        return {"text": prompt["prompt"] + text}
    return {"messages": [*prompt["messages"], {"role": "assistant", "content": text}]}
