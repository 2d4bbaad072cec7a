"""Tokenizers trained here: byte-level BPE for text, and one token a character for puzzles.

Both decode to exactly what was encoded, have the same three special tokens, and are ordinary
`PreTrainedTokenizerFast` objects: `save_pretrained` and `AutoTokenizer.from_pretrained` give them back.
Neither adds a token on its own: whoever builds sequences puts `bos_token`, the same as `eos_token`, before a
document.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybrid.common.checks import require

MASK, EOS, PAD = "<|mask|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (MASK, EOS, PAD)  # their ids are 0, 1, 2

# No token crosses the boundaries that this draws. In order: a word with the space before it and whatever
# stands against it (`self.`, `__init__(self,`); a line's end, with blank lines and the next line's
# indentation in fours; other blanks, of which the last is left for the word after them.
#
# Bytes a token on the held-out files of `stdlib` (CPython 3.11), at 2,048 entries trained on all the rest:
# this 3.40, GPT-2's pattern 3.20, GPT-4's 3.21. Gluing the line's end to the word before or after it gives
# 3.49 or 3.52, but then a prompt that ends with a line, or a hole between two lines, cuts through what
# training mostly showed as one token.
#
# Nor is a piece longer than this: what merging costs grows with the square of its length, and a word of a million
# letters would never end.
_LONGEST = 256
_PATTERN = rf" ?\S{{1,{_LONGEST}}}|\s{{0,{_LONGEST}}}\n(?:    ){{0,64}}|\s{{1,{_LONGEST}}}(?!\S)|\s{{1,{_LONGEST}}}"

# Training time grows faster than the text: of 9 MB, 3 MB take 2.5 s instead of 9, for 1% fewer bytes a token.
_TRAINING_BYTES = 3_000_000


def train_bpe(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of at most `vocab_size` entries, the three special ones included.

    All 256 bytes are entries, so any text is encoded, and decodes to itself exactly. The same texts in the
    same order give the same tokenizer; of more than 3 MB, an evenly spaced selection of about 3 MB is used.
    Texts with too little repetition give fewer entries than asked for: size a model by `len(tokenizer)`.
    Raises ValueError if `vocab_size` has no room for the bytes and the special tokens, or if `texts` is one
    string.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    require(vocab_size >= smallest, f"vocab_size={vocab_size} is too small: 256 bytes and 3 specials need {smallest}")
    if isinstance(texts, str):
        raise ValueError("texts is one string, to be read a character at a time: pass a list of strings")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_without_specials, _thinned(list(texts))), trainer)
    return _wrap(tokenizer)


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of `characters` (repeats count once), after the special tokens.

    Encoding text with any other character raises an error (a bare `Exception`, the `tokenizers` library's):
    there is no unknown token for it to turn into. Raises ValueError if `characters` is empty.
    """
    require(bool(characters), "characters is empty: pass the alphabet as one string, for example '0123456789+='")
    entries = (*SPECIAL_TOKENS, *dict.fromkeys(characters))
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts spaces between the characters
    return _wrap(tokenizer)


def _thinned(texts: list[str]) -> list[str]:
    share = _TRAINING_BYTES / max(1, sum(len(text.encode()) for text in texts))
    if share >= 1:
        return texts
    return [text for i, text in enumerate(texts) if ceil((i + 1) * share) > ceil(i * share)]


def _without_specials(text: str) -> str:
    # A merge that spells a special token would be given its id, and plain text would then encode to it.
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=MASK,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
