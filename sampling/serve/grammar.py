"""Structured output: texts that keep to a JSON schema or a regular expression, by outlines-core.

A grammar is an automaton over the tokens of the vocabulary. It is built in a process of its own, within bounds of time
and memory, and kept for the next request with the same one. A text follows it as a logits processor, which sees what
stands before each token: every mode therefore keeps to it exactly, and those that draft in any order go from left to
right.
"""

import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.sampling.serve import grammar_process
from hybrid.sampling.serve.grammar_process import receive, send
from hybrid.sampling.serve.protocol import ApiError
from hybrid.sampling.serve.text import TokenBytes

SECONDS = 15.0
MEMORY = 2 * 2**30  # bytes of the process that builds grammars
KEPT = 32  # grammars
MASKS = 512  # of a grammar, one for each state that texts were in
# An object whose values may be lists and objects of plain values.
_STRING = r'"([^"\\\x00-\x1f\x7f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
_PLAIN = rf"({_STRING}|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null)"
_LIST = r"\[[ \n]*({0}(,[ \n]*{0})*)?[ \n]*\]"
_OBJECT = r"\{{[ \n]*({1}:[ ]?{0}(,[ \n]*{1}:[ ]?{0})*)?[ \n]*\}}"
_VALUE = f"({_PLAIN}|{_LIST.format(_PLAIN)}|{_OBJECT.format(_PLAIN, _STRING)})"
JSON_OBJECT = _OBJECT.format(_VALUE, _STRING)
SAMPLE = 'a "b": {é ☕\n 0}'


class Grammar:
    """An automaton, and for each of its states what may follow.

    Attributes:
        start: the state before the first token.
    """

    def __init__(self, index: Any, vocabulary: int) -> None:
        self.index, self.vocabulary, self.start = index, vocabulary, index.get_initial_state()
        self._masks: OrderedDict[int, Tensor] = OrderedDict()

    def follow(self, state: int, token: int) -> int | None:
        found: int | None = self.index.get_next_state(state, token)
        return found

    def mask(self, state: int, ends: frozenset[int]) -> Tensor:
        """float32 `[V]`: 0 where a token may follow, else -inf."""
        if state not in self._masks:
            allowed = set(self.index.get_allowed_tokens(state) or ()) - ends
            if self.index.is_final_state(state):
                allowed |= ends
            mask = torch.full((self.vocabulary,), -torch.inf)
            mask[torch.tensor(sorted(allowed), dtype=torch.int64)] = 0.0
            self._masks[state] = mask
            if len(self._masks) > MASKS:
                self._masks.popitem(last=False)
        return self._masks[state]


class Follow:
    """The logits processor of one text that follows a grammar."""

    def __init__(self, grammar: Grammar, prompt: int, ends: frozenset[int]) -> None:
        self.grammar, self.prompt, self.ends = grammar, prompt, ends
        self.tokens: list[int] = []
        self.states: list[int | None] = [grammar.start]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        state = self._state(ids[0, self.prompt :].tolist())
        return scores if state is None else scores + self.grammar.mask(state, self.ends).to(scores)

    def _state(self, tokens: list[int]) -> int | None:
        """Where the automaton is behind some text; None behind its end."""
        same = next((i for i, (a, b) in enumerate(zip(tokens, self.tokens, strict=False)) if a != b), None)
        known = min(len(tokens), len(self.tokens)) if same is None else same
        del self.states[known + 1 :]
        for token in tokens[known:]:
            last = self.states[-1]
            self.states.append(None if last is None or token in self.ends else self.grammar.follow(last, token))
        self.tokens = tokens
        return self.states[-1]


class Grammars:
    """Builds grammars over one vocabulary, and keeps them. For any thread, one at a time; `tokenizer` is theirs alone.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int], seconds: float = SECONDS) -> None:
        self.tokenizer, self.vocabulary, self.ends, self.seconds = tokenizer, vocabulary, ends, seconds
        self._kept: OrderedDict[tuple[str, str], Grammar | ApiError] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._words: dict[bytes, list[int]] | None = None
        self._lock = threading.Lock()

    def get(self, kind: str, text: str) -> Grammar:
        """The grammar of a "regex" or a JSON "schema".

        Raises:
            ApiError: it cannot be built, or not within the bounds, or not over this tokenizer.
        """
        with self._lock:
            key = (kind, text)
            if key not in self._kept:
                try:
                    self._kept[key] = self._build(kind, text)
                except ApiError as error:  # asked again, it would take as long again
                    self._kept[key] = error
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            if isinstance(found := self._kept[key], ApiError):
                raise found
            return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _build(self, kind: str, text: str) -> Grammar:
        if not self.ends:
            raise ApiError(400, "response_format: this model has no token that ends a text.", param="response_format")
        late = threading.Timer(self.seconds, self._kill)
        try:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            late.start()
            send(process.stdin, (kind, text))
            what, found = receive(process.stdout)
        except (EOFError, OSError):
            self.close()
            raise ApiError(
                400, f"response_format: this grammar takes more than {self.seconds:.0f} seconds or "
                f"{MEMORY // 2**20} MB to build: make it simpler.", param="response_format",
            ) from None  # fmt: skip
        finally:
            late.cancel()
        if what == "error":
            raise ApiError(400, f"response_format: {found}", param="response_format")
        return Grammar(found, self.vocabulary)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(grammar_process.__file__))], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert self._process.stdin is not None
            send(self._process.stdin, (min(self.ends), self._vocabulary(), MEMORY))
        return self._process

    def _vocabulary(self) -> dict[bytes, list[int]]:
        """Tokens by the bytes that they stand for."""
        if self._words is None:
            spell = TokenBytes(self.tokenizer)
            given = self.tokenizer.encode(SAMPLE, add_special_tokens=False) if self._spells(SAMPLE) else []
            if not given or b"".join(map(spell, given)).decode(errors="replace").lstrip(" ") != SAMPLE:
                pieces = self.tokenizer.encode("a b", add_special_tokens=False)
                if b"".join(map(spell, pieces)).decode(errors="replace").lstrip(" ") != "a b":
                    raise ApiError(
                        400, "response_format: it is not known which text the tokens of this tokenizer stand for.",
                        param="response_format",
                    )  # fmt: skip
            self._words = {}
            for token in range(min(self.vocabulary, len(self.tokenizer))):
                if token not in spell.special and token not in self.ends and (written := spell(token)):
                    self._words.setdefault(written, []).append(token)
        return self._words

    def _spells(self, text: str) -> bool:
        try:
            return bool(self.tokenizer.encode(text, add_special_tokens=False))
        except Exception:  # no token for some character
            return False
