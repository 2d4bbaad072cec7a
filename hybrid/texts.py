"""Text to tokens and back, for everything that reads text or writes it: commands, evaluations, lm-eval's harness.

The tokenizer alone decides how a text begins: with what it puts there itself, else with its `bos_token`, if it has one
(rows of training data begin so). What config.json calls bos decides nothing. A special token is what a chat template or
the tokenizer writes: one that is spelled in somebody's text is that text, letter by letter. And what was encoded comes
back byte for byte, the first space too.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

# What other text ends with while it is found out how a tokenizer writes what stands behind it.
BEFORE = ("\n", ".", "a", "0")
SAID = frozenset({"tools", "documents"})  # options of chat templates that are somebody's text


class Chat(str):
    """A conversation as its template writes it. The template's special tokens are meant, but those that somebody
    spelled are not: they stand at `spelled`, pairs of begin and end."""

    spelled: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: str) -> "Chat":
        return _chat(str(self) + other, self.spelled)

    def behind(self, begin: int) -> "Chat":
        """What stands behind the first `begin` characters."""
        return _chat(str(self)[begin:], tuple((a - begin, b - begin) for a, b in self.spelled if a >= begin))

    def rstrip(self, chars: str | None = None, /) -> "Chat":
        return _chat(str(self).rstrip(chars), self.spelled)


def begin_of(tokenizer: Any) -> list[int]:
    """What a text begins with."""
    for sample in (*BEFORE, ""):
        try:
            whole, bare = tokenizer.encode(sample), tokenizer.encode(sample, add_special_tokens=False)
        except Exception:
            continue
        at = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), None)
        if at is not None or not sample:
            found = whole if at is None else whole[:at]
            ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {tokenizer.bos_token_id}
            found = [token for token in found if token not in ends]
            break
    else:
        found = []
    return list(found) or ([] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)])


def prefix_of(tokenizer: Any) -> int:
    """The token before the first that can be scored: the bos token, or the one that ends what comes before.

    Raises:
        ValueError: the tokenizer has neither.
    """
    found = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if found is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token to begin a text with: give it one.")
    return int(found)


def encode(tokenizer: Any, text: str, where: str = "prompt") -> list[int]:
    """The ids of a text from its beginning. A `Chat` is taken as its template wrote it.

    Args:
        where: what errors call it.

    Raises:
        ValueError: the tokenizer has no token for some character.
    """
    if isinstance(text, Chat):
        return _written(tokenizer, text, where)
    return begin_of(tokenizer) + encode_document(tokenizer, text, where)


def encode_document(tokenizer: Any, text: str, where: str = "text") -> list[int]:
    """The same without what a text begins with.

    Raises:
        ValueError: the tokenizer has no token for some character.
    """
    ids = _apart(tokenizer, text, where, _own)
    if text[:1] == " " and _raw(tokenizer, ids) != text:
        # SentencePiece takes a first space for the one that it puts there itself.
        spaced = encode_behind(tokenizer, " " + text, where)
        ids = spaced if _raw(tokenizer, spaced) == text else ids
    return ids


def encode_behind(tokenizer: Any, text: str, where: str = "prompt") -> list[int]:
    """The ids of a text that stands behind other text. A `Chat` is taken as its template wrote it.

    Raises:
        ValueError: the tokenizer has no token for some character.
    """
    if isinstance(text, Chat):
        return _written(tokenizer, text, where, _behind)
    return _apart(tokenizer, text, where, _behind)


def encode_gaps(tokenizer: Any, text: str, mask_token_id: int, where: str = "prompt") -> list[int]:
    """The ids of a text in which `<mask>` and `<mask:N>` stand for one and N gaps.

    Raises:
        ValueError: there is no gap, one of no tokens, or the tokenizer has no token for some character.
    """
    first, *rest = re.split(r"<mask(?::(\d+))?>", text)
    if not rest:
        raise ValueError(f"{where}: no gap to fill; write <mask> for one token, or <mask:12> for twelve.")
    if any(count and int(count) == 0 for count in rest[::2]):
        raise ValueError(f"{where}: <mask:0> is no gap; write <mask:N> for N tokens, one at least.")
    ids = encode(tokenizer, first, where)
    for count, piece in zip(rest[::2], rest[1::2], strict=True):
        ids += [mask_token_id] * int(count or 1) + encode_behind(tokenizer, piece, where)
    return ids


def chat_text(tokenizer: Any, messages: Sequence[Any], where: str = "prompt", **options: Any) -> Chat:
    """A conversation in the tokenizer's template, by default with the answer about to begin.

    Args:
        options: of `apply_chat_template`.

    Raises:
        ValueError: the tokenizer has no chat template, or it takes no such conversation.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: this model's tokenizer has no chat template; give text to be continued instead.")
    # A mark inside every special token that somebody spells, so that it is known again in what the template makes.
    said: list[str] = [str(tokenizer.chat_template)]

    def noted(text: str) -> str:
        said.append(text)
        return text

    _everywhere(noted, [*messages, options])
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in text for text in said))
    spelled = _specials(tokenizer)

    def marked(text: str) -> str:
        return spelled.sub(lambda found: found[0][0] + mark + found[0][1:], text) if spelled else text

    options = {"add_generation_prompt": True, **options, "tokenize": False}
    for name in SAID.intersection(options):
        options[name] = _everywhere(marked, options[name])
    try:
        written = str(tokenizer.apply_chat_template(_everywhere(marked, list(messages)), **options))
    except (TemplateError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the chat template failed ({error}).") from error
    parts = written.split(mark)
    written, spans = "".join(parts), list[tuple[int, int]]()
    for at in itertools.accumulate(map(len, parts[:-1])):
        found = spelled.match(written, at - 1) if spelled else None
        spans.append((at - 1, found.end() if found else at))
    return _chat(written, tuple(spans))


def count_spelled(tokenizer: Any, text: str) -> int:
    """How many special tokens a text spells, each of which becomes a token at least: to refuse a text before it is
    encoded."""
    pattern = _specials(tokenizer)
    return 0 if pattern is None else sum(1 for _ in pattern.finditer(text))


def decode(tokenizer: Any, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """The text of tokens, without special ones.

    Args:
        after: what stands before them, which some tokenizers must know to give back a first space.
    """
    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before = text(after) if len(after) else ""
    whole = text([*after, *ids])
    return whole[len(before) :] if before and whole.startswith(before) else text(ids)


def written(tokenizer: Any, ids: Sequence[int], after: Sequence[int] = ()) -> list[tuple[str, bool]]:
    """The text of tokens in parts, special ones too: what each says, and whether it is one of those.

    Args:
        after: what stands before them.
    """
    control, parts = {i: token for token, i in _special_tokens(tokenizer).items()}, list[tuple[str, bool]]()
    for special, run in itertools.groupby(range(len(ids)), lambda place: ids[place] in control):
        places = list(run)
        own = [ids[place] for place in places]
        if special:
            parts += [(control[token], True) for token in own]
        else:
            parts.append((decode(tokenizer, own, [*after, *ids[: places[0]]]), False))
    return parts


def _chat(text: str, spelled: tuple[tuple[int, int], ...]) -> Chat:
    found = Chat(text)
    found.spelled = spelled
    return found


def _everywhere(change: Callable[[str], str], value: Any) -> Any:
    """`value` with all its strings changed, but for roles, which templates compare."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_everywhere(change, x) for x in value]
    if isinstance(value, dict):
        return {k: x if k == "role" else _everywhere(change, x) for k, x in value.items()}
    return value


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens that control, by how they are spelled; the one that stands for an unknown character controls nothing."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {str(token): int(i) for i, token in added.items() if getattr(token, "special", False)}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    found |= {str(token): int(i) for token, i in named}
    return {token: i for token, i in found.items() if i != getattr(tokenizer, "unk_token_id", None) and token}


def _specials(tokenizer: Any, more: str | None = None) -> re.Pattern[str] | None:
    found = sorted([*_special_tokens(tokenizer), *([more] if more else [])], key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def _raw(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ids(tokenizer: Any, text: str, where: str, **options: Any) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False, **options)) if text else []
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{where}: the tokenizer has no token for some character ({error}).") from error


def _own(tokenizer: Any, text: str, where: str) -> list[int]:
    return _ids(tokenizer, text, where, split_special_tokens=True)


def _behind(tokenizer: Any, text: str, where: str) -> list[int]:
    ids = _own(tokenizer, text, where)
    for before in BEFORE if text else ():
        try:
            given, whole = _own(tokenizer, before, where), _own(tokenizer, before + text, where)
        except ValueError:
            continue
        if _raw(tokenizer, [*given, *ids]) == before + text:
            return ids
        # SentencePiece puts a space before whatever it is given: what is wanted is what it adds here.
        if whole[: len(given)] == given and _raw(tokenizer, whole) == before + text:
            return whole[len(given) :]
    return ids


Way = Callable[[Any, str, str], list[int]]


def _apart(tokenizer: Any, text: str, where: str, way: Way) -> list[int]:
    """The ids of a text in which no special token is meant, as `way` finds those of its beginning."""
    ids, control = way(tokenizer, text, where), set(_special_tokens(tokenizer).values())
    unknown = tokenizer.unk_token if tokenizer.unk_token_id in ids else None
    if control.isdisjoint(ids) and (unknown is None or unknown not in text):
        return ids
    # One whose vocabulary has them as words like others: taken apart, they are none.
    pattern = _specials(tokenizer, unknown)
    pieces = re.split(f"({pattern.pattern})", text) if pattern else [text]
    parts = [part for i, piece in enumerate(pieces) for part in ((piece[:1], piece[1:]) if i % 2 else (piece,)) if part]
    ids = way(tokenizer, parts[0], where) + [i for part in parts[1:] for i in _behind(tokenizer, part, where)]
    if not control.isdisjoint(ids):
        raise ValueError(f"{where} spells a special token, which this tokenizer cannot write as text: {text[:60]!r}.")
    return ids


def _written(tokenizer: Any, chat: Chat, where: str, way: Way = _own) -> list[int]:
    """The ids of a conversation, whose special tokens are the template's; `way`: as its beginning is found."""
    pattern, control = _specials(tokenizer), _special_tokens(tokenizer)
    if pattern is None or (not chat.spelled and way is _own):
        return _ids(tokenizer, chat, where) if way is _own else way(tokenizer, chat, where)
    begins = [begin for begin, _ in chat.spelled]
    ends = list(itertools.accumulate((end for _, end in chat.spelled), max))

    def meant(a: int, b: int) -> bool:
        after = bisect.bisect_right(ends, a)
        return after == len(ends) or begins[after] >= b

    spans = [found.span() for found in pattern.finditer(chat) if meant(*found.span())]
    # Behind a special token some tokenizers begin a text anew, and some go on.
    probe = f"{next(iter(control))}a"
    anew = _ids(tokenizer, probe, where)[1:] == _own(tokenizer, "a", where)
    ids: list[int] = []
    begin = 0
    for a, b in [*spans, (len(chat), len(chat))]:
        if begin < a:
            ids += _apart(tokenizer, chat[begin:a], where, way if not begin else _own if anew else _behind)
        ids += [control[chat[a:b]]] if a < b else []
        begin = b
    return ids
