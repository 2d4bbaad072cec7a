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
from hybrid.evals.outputs import Prompt


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
    if given == ["messages"]:
        text = _conversation(fields["messages"], where, tokenizer)
        return Prompt(ids=encoded(text, where, tokenizer), text=text, target=fields.get("target", ""))
    text = fields[given[0]]
    begin = model.config.bos_token_id
    ids = encoded(text, where, tokenizer)
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    if not ids:
        raise ValueError(f"{where} is empty, and this model has no token to begin a text with: give some text.")
    return Prompt(ids=ids, text=text, target=fields.get("target", ""))


def _conversation(messages: Any, where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where} has messages, and this model's tokenizer has no chat template: give a prompt.")
    good = isinstance(messages, Sequence) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip
    if not good:
        raise ValueError(f'{where}: messages must be a list of {{"role": "…", "content": "…"}}, at least one.')
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template failed ({error}).") from error


def encoded(text: str, where: str, tokenizer: Any) -> list[int]:
    """Token ids; nothing is added.

    Raises:
        ValueError: the tokenizer cannot write the text.
    """
    try:
        return list(tokenizer.encode(text, add_special_tokens=False)) if text else []
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{where}: the tokenizer has no token for some character ({error}).") from error
