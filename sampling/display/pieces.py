"""The text of single tokens, for displays that give each token a look of its own."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 4  # bytes of a character in UTF-8, and so the most tokens that one is spread over

# A model may write escape codes, and a terminal would obey them. ␛ and its like only look like what they stand for.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), ord(_BROKEN))


def visible(text: str) -> str:
    """`text` with control characters replaced by pictures of them, except for newlines and tabs."""
    return text.translate(_VISIBLE)


class Pieces:
    """Cuts a text into what each of its tokens adds to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, tokens: Sequence[int | None]) -> list[str]:
        """One text a token, with `visible` applied; "" for None.

        A character whose bytes are spread over several tokens stands with the first of them, and the others are "";
        while some of them are missing, each is a replacement character.
        """
        pieces: list[str] = []
        while (i := len(pieces)) < len(tokens):
            token = tokens[i]
            if token is None:
                pieces.append("")
                continue
            pieces.append(self._alone(token))
            if _BROKEN in pieces[-1]:
                group: tuple[int, ...] = (token,)
                for following in tokens[i + 1 : i + _LONGEST]:
                    if following is None:
                        break
                    group = (*group, following)
                    if _BROKEN not in (whole := self._decode(group)):
                        pieces[-1:] = [whole, *[""] * (len(group) - 1)]
                        break
        return pieces

    def _alone(self, token: int) -> str:
        # Many decoders drop a space before the first token: the second of two has it.
        return self._decode((token, token))[len(self._decode((token,))) :]

    def _decode(self, tokens: tuple[int, ...]) -> str:
        if tokens not in self._known:
            text = self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            self._known[tokens] = visible(text)
        return self._known[tokens]
