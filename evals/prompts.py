"""Prompts from a JSON Lines file: text to be continued, or conversations to be answered.

    {"prompt": "def area(r):\\n", "target": "    return pi * r ** 2\\n"}
    {"text": "Once upon a time"}
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "target": "4"}

`text` is another word for `prompt`. `target`, the true continuation, is needed by the measures that compare with one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybrid import HybridForCausalLM
from hybrid.common.files import BadLine, json_of, real_text
from hybrid.evals.passes.outputs import Prompt
from hybrid.texts import Chat, chat_text, encode


class Line(NamedTuple):
    """One prompt of a file: `said`, a text or a conversation, and what should follow.

    Attributes:
        number: of the line, from 1.
        where: what a complaint begins with.
    """

    number: int
    where: str
    said: str | Chat
    target: str


def read_prompts(path: Path) -> list[Line]:
    """The prompts of a file.

    Raises:
        ValueError: there is no such file, no prompt in it, or a line that is none; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: there is no file {path}; it has a prompt a line, as JSON.")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"prompts: {path}, line {number}"
            try:
                found.append(_line(number, where, json_of(line)))
            except BadLine as error:
                raise ValueError(f"{where} {error}.") from error
    if not found:
        raise ValueError(f'prompts: {path} has no lines; give at least one, as {{"prompt": "…", "target": "…"}}.')
    return found


def ids_of(line: Line, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: a conversation in the chat template with the answer about to begin, or a text from its
    beginning.

    Raises:
        ValueError: the tokenizer cannot write it, or has no chat template, or nothing to begin an empty text with.
    """
    text = line.said
    if not isinstance(text, str):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{line.where} has messages, and this tokenizer has no chat template: give a prompt.")
        text = chat_text(tokenizer, text, line.where)
    ids = encode(tokenizer, text, line.where)
    if not ids:
        raise ValueError(f"{line.where} is empty, and this model has no token to begin a text with: give some text.")
    return ids


def load_prompts(path: Path, model: HybridForCausalLM, tokenizer: Any) -> list[Prompt]:
    """The prompts of a file (`path`), tokenised for the model by its `tokenizer`.

    Raises:
        ValueError: what `read_prompts` and `ids_of` raise, or a token is not the model's.
    """
    found = []
    for line in read_prompts(path):
        ids = ids_of(line, tokenizer)
        if max(ids) >= model.config.vocab_size:
            raise ValueError(f"{line.where} has a token that the model lacks: is this its tokenizer?")
        found.append(Prompt(ids=ids, text=str(line.said), target=line.target))
    return found


def check_prompts(
    model: HybridForCausalLM, prompts: Sequence[Prompt], max_new_tokens: int, needs_targets: bool
) -> None:
    """Raise ValueError unless every prompt can be continued that far, and graded."""
    if not prompts:
        raise ValueError("prompts: there are none; give at least one held-out prompt.")
    room = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if not prompt.ids:
            raise ValueError(f"prompts: number {number} is empty, and this model has no token to begin a text with.")
        if model.config.is_hybrid and model.config.mask_token_id in prompt.ids:
            raise ValueError(f"prompts: number {number} has the mask token in it, which only infilling takes: cut it.")
        if max(prompt.ids) >= model.config.vocab_size:
            raise ValueError(f"prompts: number {number} has a token that the model lacks: is this its tokenizer?")
        if len(prompt.ids) + max_new_tokens > room:
            raise ValueError(
                f"prompts: number {number} has {len(prompt.ids)} tokens, and with max_new_tokens={max_new_tokens} it "
                f"goes past the model's context of {room}: shorten it, or ask for fewer new tokens."
            )
        if needs_targets and not prompt.target:
            raise ValueError(
                f"prompts: number {number} has no target, which this quality compares with: give every prompt the "
                "true continuation, or choose a quality that needs none (judge_perplexity, parses)."
            )


def _line(number: int, where: str, record: Any) -> Line:
    fields = record if isinstance(record, dict) else {}
    given = [name for name in ("prompt", "text", "messages") if name in fields]
    if len(given) != 1:
        said = f"has {' and '.join(given)}, of which one is enough" if given else "lacks prompt"
        raise ValueError(f'{where} {said}; a line is {{"prompt": "…", "target": "…"}} or {{"messages": […]}}.')
    for name in ("prompt", "text", "target"):
        if name in fields and not isinstance(fields[name], str):
            raise ValueError(f"{where}: {name} is {fields[name]!r}; it must be text.")
    text = fields[given[0]]
    if given == ["messages"]:
        good = isinstance(text, Sequence) and text and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in text
        )  # fmt: skip
        if not good:
            raise ValueError(f'{where}: messages must be a list of {{"role": "…", "content": "…"}}, at least one.')
    for part in [text] if isinstance(text, str) else [m["role"] + m["content"] for m in text]:
        real_text(part)
    return Line(number, where, text, fields.get("target", ""))
