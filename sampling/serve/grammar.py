"""Structured output: texts that keep to a JSON schema or a regular expression, by outlines-core.

A grammar is an automaton over the tokens of the vocabulary. It is built in a process of its own, within bounds of time
and memory, and kept for the next request with the same one. A text follows it as a logits processor, which sees what
stands before each token: every mode therefore keeps to it exactly, and those that draft in any order go from left to
right.
"""

import importlib.util
import json
import subprocess
import sys
from functools import cached_property, lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.common.checks import require
from hybrid.sampling.serve import grammar_process
from hybrid.sampling.serve.protocol import ApiError, Format
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
SAMPLES = 'a "b": {é ☕\n 0}', "a b"  # the second for tokenizers that cannot write the first


class Grammar:
    """An automaton, and for each of its states what may follow.

    Attributes:
        start: the state before the first token.
    """

    def __init__(self, index: Any, vocabulary: int) -> None:
        self.index, self.vocabulary, self.start = index, vocabulary, index.get_initial_state()
        self.follow, self.mask = index.get_next_state, lru_cache(MASKS)(self._mask)

    def _mask(self, state: int, ends: frozenset[int]) -> Tensor:
        """float32 `[V]`: 0 where a token may follow, else -inf."""
        allowed = set(self.index.get_allowed_tokens(state) or ()) - ends
        allowed |= ends if self.index.is_final_state(state) else set()
        mask = torch.full((self.vocabulary,), -torch.inf)
        mask[torch.tensor(sorted(allowed), dtype=torch.int64)] = 0.0
        return mask


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
    """Builds grammars over one vocabulary, and keeps them. For one thread; `tokenizer` is theirs alone.

    Attributes:
        missing: what keeps this server from building any; None: nothing does.
        seconds: for one, at most.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends, self.seconds = tokenizer, vocabulary, ends, SECONDS
        installed = importlib.util.find_spec("outlines_core") is not None
        self.missing = None if installed else "outlines-core is not installed here"
        if tokenizer is None:
            self.missing = "this model has no tokenizer"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._found = lru_cache(KEPT)(self._build)

    def get(self, asked: Format) -> Grammar:
        """What a text has to keep to. Building it may take long.

        Raises:
            ApiError: it cannot be built, or not within the bounds, or not over this tokenizer.
        """
        schema, kind = asked.json_schema, "regex" if asked.json_schema is None else "schema"
        text = (asked.regex or JSON_OBJECT) if schema is None else json.dumps(schema.schema_)
        found = self._found(kind, text)
        if isinstance(found, Grammar):
            return found
        raise ApiError(400, f"response_format: {found}", param="response_format")

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _build(self, kind: str, text: str) -> Grammar | str:
        """A grammar, or why there is none, which is kept as well: asked again, it would take as long again."""
        if self.missing or not self.ends:
            return f"{self.missing or 'this model has no token that ends a text'}."
        try:
            pipe = self._started()
            pipe.send((kind, text))
            what, found = pipe.recv() if pipe.poll(self.seconds) else ("late", None)
        except (EOFError, OSError):
            what = "late"
        except ValueError as error:
            return str(error)
        if what == "late":
            self.close()
            bounds = f"{self.seconds:.0f} seconds or {MEMORY // 2**20} MB"
            return f"this grammar takes more than {bounds} to build: make it simpler."
        return Grammar(found, self.vocabulary) if what == "index" else str(found)

    def _started(self) -> Connection:
        if self._process is None or self._pipe is None or self._process.poll() is not None:
            self.close()
            self._pipe, theirs = Pipe()
            command = [sys.executable, "-I", str(Path(grammar_process.__file__)), str(theirs.fileno())]
            none = subprocess.DEVNULL
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=none, stdout=none, stderr=none
            )  # fmt: skip
            theirs.close()
            self._pipe.send((min(self.ends), self._vocabulary, MEMORY))
        return self._pipe

    @cached_property
    def _vocabulary(self) -> dict[bytes, list[int]]:
        """Tokens by the bytes that they stand for.

        Raises:
            ValueError: nobody knows which.
        """
        spell, found = TokenBytes(self.tokenizer), dict[bytes, list[int]]()

        def spells(text: str) -> bool:
            try:
                pieces = map(spell, self.tokenizer.encode(text, add_special_tokens=False))
            except Exception:  # no token for some character
                return False
            return b"".join(pieces).decode(errors="replace").lstrip(" ") == text

        require(any(map(spells, SAMPLES)), "it is not known which text the tokens of this tokenizer stand for.")
        for token in range(min(self.vocabulary, len(self.tokenizer))):
            if token not in spell.special and token not in self.ends and (written := spell(token)):
                found.setdefault(written, []).append(token)
        return found
