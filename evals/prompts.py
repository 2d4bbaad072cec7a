"""Prompts from a JSON Lines file: text to be continued, or conversations to be answered.

    {"prompt": "def area(r):\\n", "target": "    return pi * r ** 2\\n"}
    {"text": "Once upon a time"}
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "target": "4"}

`text` is another word for `prompt`. `target`, the true continuation, is needed by the measures that compare with one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid import HybridForCausalLM
from hybrid.evals.passes.outputs import Prompt
from hybrid.texts import Chat, chat_text, encode


def load_prompts(path: Path, model: HybridForCausalLM, tokenizer: Any) -> list[Prompt]:
    """The prompts of a file, tokenised for the model.

    Raises:
        ValueError: no prompt in the file, or a line that is none; the message names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"prompts: {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}).") from error
        found.append(_prompt(record, where, model, tokenizer))
    if not found:
        raise ValueError(f'prompts: {path} has no lines; give at least one, as {{"prompt": "…", "target": "…"}}.')
    return found


def _prompt(record: Any, where: str, model: HybridForCausalLM, tokenizer: Any) -> Prompt:
    fields = record if isinstance(record, dict) else {}
    given = [name for name in ("prompt", "text", "messages") if name in fields]
    if len(given) != 1:
        said = f"has {' and '.join(given)}, of which one is enough" if given else "lacks prompt"
        raise ValueError(f'{where} {said}; a line is {{"prompt": "…", "target": "…"}}.')
    for name in ("prompt", "text", "target"):
        if name in fields and not isinstance(fields[name], str):
            raise ValueError(f"{where}: {name} is {fields[name]!r}; it must be text.")
    text = fields[given[0]]
    if given == ["messages"]:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{where} has messages, and this model's tokenizer has no chat template: give a prompt.")
        text = _conversation(text, where, tokenizer)
    ids = encode(tokenizer, text, where)
    if not ids:
        raise ValueError(f"{where} is empty, and this model has no token to begin a text with: give some text.")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"{where} has a token that the model lacks: is this its tokenizer?")
    return Prompt(ids=ids, text=str(text), target=fields.get("target", ""))


def _conversation(messages: Any, where: str, tokenizer: Any) -> Chat:
    good = isinstance(messages, Sequence) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip
    if not good:
        raise ValueError(f'{where}: messages must be a list of {{"role": "…", "content": "…"}}, at least one.')
    return chat_text(tokenizer, messages, where)
