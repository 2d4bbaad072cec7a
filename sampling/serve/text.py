"""Tokens to text, one after another, as clients are sent it."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # tokens that a character can be spread over
CONTEXT = 6  # tokens of the prompt that are decoded along: some tokenizers write a space only behind others


class Text:
    """A text that grows by tokens, and ends before the first of its stop strings.

    A character whose bytes are spread over several tokens comes whole, and what may turn out to be the beginning of a
    stop string is held back until it is known not to be.

    Attributes:
        text: all that is decoded; behind a stop string nothing is.
        count: tokens that were added.
        stopped: whether a stop string was there.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens = list(before[-CONTEXT:])
        self.begin, self.end = 0, len(self.tokens)  # of those tokens that were decoded last, and give the next a place
        self.text, self.count, self.stopped, self.sent = "", 0, False, 0

    def add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not self.stopped:
                self.tokens.append(token)
                self._advance()
            self.count += 1

    def take(self, last: bool = False) -> str:
        """What is new and certain; with `last`, all there is."""
        if last and not self.stopped and self.end < len(self.tokens):
            self._move(len(self.tokens))
        end = len(self.text)
        if not (last or self.stopped):
            end = min((self._held(stop) for stop in self.stops), default=end)
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def _advance(self) -> None:
        """Decode what is whole."""
        fresh = self._fresh(len(self.tokens))
        if not fresh.endswith(BROKEN):
            self._move(len(self.tokens))
        elif len(self.tokens) - self.end > 2 * LONGEST:
            # Bytes that never become a character: what stands before a place where one may begin is as it is.
            for cut in range(len(self.tokens) - 1, self.end, -1):
                behind = self._decode(cut, len(self.tokens))
                if len(self.tokens) - cut >= LONGEST or self._decode(self.end, cut) + behind == fresh:
                    return self._move(cut)

    def _move(self, end: int) -> None:
        fresh = self._fresh(end)
        self.begin, self.end = self.end, end
        # Token by token, so that a long text is not copied for each.
        old, self.text = len(self.text), self.text + fresh
        found = [at for stop in self.stops if (at := self.text.find(stop, max(0, old - len(stop) + 1))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _fresh(self, end: int) -> str:
        """What the tokens up to there add to those that were decoded."""
        return self._decode(self.begin, end)[len(self._decode(self.begin, self.end)) :]

    def _decode(self, begin: int, end: int) -> str:
        tokens = self.tokens[begin:end]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _held(self, stop: str) -> int:
        """Where what may be a beginning of `stop` begins at the end of the text."""
        length = len(self.text)
        ends = range(max(self.sent, length - len(stop) + 1), length)
        return next((at for at in ends if stop.startswith(self.text[at:])), length)


class Stops:
    """A criterion of a request: whether its text has come to a stop string."""

    def __init__(self, text: Text, prompt: int) -> None:
        self.text, self.prompt = text, prompt

    def __call__(self, ids: Any, scores: Any) -> bool:
        self.text.add(ids[0, self.prompt + self.text.count :].tolist())
        return self.text.stopped


class TokenBytes:
    """The bytes that each token stands for in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(
            tokenizer.all_special_ids
        )
        kinds = _decoders(tokenizer)
        # The byte that each letter of a byte-level vocabulary stands for.
        self._letters = {letter: byte for byte, letter in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
        self._known = functools.cache(self._of)
        self._space = "▁" if {"Metaspace", "ByteFallback"} & set(kinds) else None

    def __call__(self, token: int) -> bytes:
        return self._known(token)

    def _of(self, token: int) -> bytes:
        written = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        if written is None:  # models have more rows of the vocabulary than tokenizers have tokens
            return b""
        if token in self.special or token in self.tokenizer.added_tokens_decoder:
            return written.encode()
        if self._letters is not None and all(letter in self._letters for letter in written):
            return bytes(self._letters[letter] for letter in written)
        if self._space is not None:
            if len(written) == 6 and written.startswith("<0x"):
                return bytes([int(written[3:5], 16)])
            return written.replace(self._space, " ").encode()
        # Many decoders drop a space before the first token: the second of two has it.
        one, two = (self.tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
        return two[len(one) :].encode()

    def name(self, token: int) -> str:
        """As OpenAI's servers write a token; one that is a piece of a character by its bytes."""
        try:
            return self(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self(token))


def _decoders(tokenizer: Any) -> list[str]:
    """The kinds of a fast tokenizer's decoders."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    return [part["type"] for part in parts]
