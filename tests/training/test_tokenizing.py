import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import MonkeyPatch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybrid.texts import encode_document
from hybrid.training.text import tokenizing
from hybrid.training.text.tokenizing import SPECIAL_TOKENS, character_tokenizer, train_bpe

CODE = """
class Counter:
    def __init__(self, start=0):
        self.value = start

    def add(self, amount):
        if amount:
            self.value += amount
        return self.value
"""
TEXTS = [CODE.replace("Counter", name) for name in ("Counter", "Meter", "Adder")] * 3
SMALLEST = 256 + len(SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, vocab_size=320)


def assert_same_after_saving(tokenizer: PreTrainedTokenizerFast, folder: Path, text: str) -> None:
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab() and len(loaded) == len(tokenizer)
    for name in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert loaded.encode(text) == tokenizer.encode(text)
    assert encode_document(loaded, text) == encode_document(tokenizer, text)
    assert loaded.decode(loaded.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\r\n\f\x00ab.('é字🙂\u2028") | st.sampled_from(SPECIAL_TOKENS))
def test_bpe_decodes_to_exactly_what_was_encoded(bpe: PreTrainedTokenizerFast, text: str) -> None:
    for ids in (bpe.encode(text), encode_document(bpe, text)):
        assert bpe.decode(ids) == text
        assert all(0 <= i < len(bpe) for i in ids)


def test_bpe_keeps_spaces_before_punctuation_and_every_byte(bpe: PreTrainedTokenizerFast) -> None:
    text = "do n't , really ? \x7f" + "".join(map(chr, range(256))) + " \n\n  \t end  "
    assert bpe.decode(bpe.encode(text)) == text


def test_indentation_is_one_token_with_its_line_end(bpe: PreTrainedTokenizerFast) -> None:
    tokens = bpe.convert_ids_to_tokens(encode_document(bpe, "\n        return"))
    assert tokens[0] == "Ċ" + 8 * "Ġ" and len(tokens) < 4


def test_bpe_counts_its_special_tokens_and_learns_more_with_more_room(bpe: PreTrainedTokenizerFast) -> None:
    assert len(bpe) == bpe.vocab_size == 320
    assert bpe.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    smallest = train_bpe(TEXTS, vocab_size=SMALLEST)
    assert len(smallest) == SMALLEST
    assert len(encode_document(smallest, CODE)) == len(CODE) > 2 * len(encode_document(bpe, CODE))


def test_nothing_is_added_to_a_text(bpe: PreTrainedTokenizerFast) -> None:
    assert bpe.eos_token_id == bpe.bos_token_id
    assert not {0, 1, 2} & set(bpe.encode(CODE))
    assert bpe.encode("") == encode_document(bpe, "") == []


def test_special_tokens_spelled_out_in_a_document_stay_text(bpe: PreTrainedTokenizerFast) -> None:
    text = "if id == '<|mask|>' or id == '<|eos|>': pad('<|pad|>')"
    prompt, document = bpe.encode(text), encode_document(bpe, text)
    assert [i for i in prompt if i < 3] == [0, 1, 2]
    assert not {0, 1, 2} & set(document)
    assert bpe.decode(document, skip_special_tokens=True) == text
    assert bpe.encode(text) == prompt  # the helper leaves no setting behind


def test_no_merge_learned_from_text_is_a_special_token() -> None:
    tokenizer = train_bpe(["<|mask|> <|eos|> <|pad|>\n" * 500] * 4, vocab_size=400)
    document = encode_document(tokenizer, "<|mask|> <|eos|>")
    assert not {0, 1, 2} & set(document)
    assert tokenizer.decode(document) == "<|mask|> <|eos|>"


def test_the_same_texts_give_the_same_tokenizer(bpe: PreTrainedTokenizerFast) -> None:
    assert train_bpe(iter(TEXTS), vocab_size=320).get_vocab() == bpe.get_vocab()


def test_of_much_text_an_evenly_spaced_part_is_used(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_TRAINING_BYTES", 3000)
    texts = [letter * 300 for letter in "abcdefghijklmnopqrst"]  # 6000 bytes: every other one
    learned = train_bpe(texts, vocab_size=SMALLEST + 200).get_vocab()
    assert [letter for letter in "abcdefghijklmnopqrst" if letter * 2 in learned] == list("acegikmoqs")


@pytest.mark.parametrize("vocab_size", [0, SMALLEST - 1])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size={vocab_size}.*{SMALLEST}"):
        train_bpe(TEXTS, vocab_size=vocab_size)


@pytest.mark.parametrize("piece", ["abc123", "é", " ", "\n", "    \n"])
def test_a_text_without_a_break_takes_time_in_proportion(piece: str) -> None:
    """Words, blanks and lines of a million characters; and they come back as they were."""
    texts = [piece * (length // len(piece)) for length in (20_000, 200_000)]
    seconds = []
    for text in texts:
        began = time.perf_counter()
        tokenizer = train_bpe([text, CODE], vocab_size=400)
        ids = encode_document(tokenizer, text)
        seconds.append(time.perf_counter() - began)
        assert tokenizer.decode(ids) == text
    assert seconds[1] < 0.5 + 30 * seconds[0], "ten times the text; with its square it would be a hundred times"


def test_one_string_is_not_a_list_of_texts() -> None:
    with pytest.raises(ValueError, match="texts"):
        train_bpe(CODE)


def test_bpe_is_the_same_after_saving(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert_same_after_saving(bpe, tmp_path, CODE + " , 'é 字 🙂' <|mask|> \r\n\t")


def test_one_token_a_character() -> None:
    tokenizer = character_tokenizer("0123456789.=")
    ids = tokenizer.encode("12.4=")
    assert len(ids) == len(set(ids)) == 5 and min(ids) == 4
    assert tokenizer.decode(ids) == "12.4="
    assert len(tokenizer) == 12 + len(SPECIAL_TOKENS)
    assert tokenizer.encode("1<|mask|>") == [tokenizer.encode("1")[0], tokenizer.mask_token_id]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), characters=st.text(min_size=1, max_size=20))
def test_any_alphabet_round_trips(data: st.DataObject, characters: str) -> None:
    text = data.draw(st.text(alphabet=list(characters)))
    tokenizer = character_tokenizer(characters)
    ids = encode_document(tokenizer, text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text


def test_a_character_outside_the_alphabet_is_an_error(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("0123456789")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        with pytest.raises(Exception, match="UNK"):
            each.encode("12a4")
        with pytest.raises(Exception, match="UNK"):
            encode_document(each, "12<|mask|>")


def test_an_empty_alphabet_is_refused() -> None:
    with pytest.raises(ValueError, match="characters"):
        character_tokenizer("")


def test_characters_are_the_same_after_saving(tmp_path: Path) -> None:
    assert_same_after_saving(character_tokenizer("0123 456\n789.=<|mask>"), tmp_path, "1 2.\n4= ")
