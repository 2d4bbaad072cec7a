"""Judge perplexity against sums by hand, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid.evals.laboratory.judge import Judgement, judge_perplexity, load_judge, same_weights
from hybrid.evals.likelihood import ar_nll
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import character_tokenizer, train_bpe

BYTES = train_bpe(["x" * 9], 259)


def llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    given = {
        "vocab_size": len(BYTES), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.5,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**given, **fields})).eval().double()


class Even(torch.nn.Module):
    """Every token is as likely as every other, whatever stands before it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=100)
        self.device = torch.device("cpu")
        self.vocabulary = vocabulary

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        class Out:
            logits = torch.zeros(*input_ids.shape, self.vocabulary)

        return Out


def test_an_even_judge_by_hand() -> None:
    """8 entries: 3 bits a token, and "é" is two bytes of one token."""
    tokenizer = character_tokenizer("abcdé")
    judge: Any = Even(8)
    found = judge_perplexity(judge, tokenizer, ["ab", "éba"], prompts=["c", ""], writer=None)
    assert found.perplexity == pytest.approx(8) and found.perplexities == pytest.approx((8, 8))
    assert (found.tokens, found.sizes, found.own) == ((2, 3), (2, 4), False)
    assert found.bits_per_byte == pytest.approx(5 * 3 / 6)


def test_perplexity_weighs_texts_by_their_length() -> None:
    found = Judgement(nats=(2.0, 12.0), tokens=(1, 3), sizes=(4, 6), own=False)
    assert found.perplexity == pytest.approx(math.exp(14 / 4))
    assert found.perplexities == pytest.approx((math.exp(2), math.exp(4)))
    assert found.bits_per_byte == pytest.approx(14 / math.log(2) / 10)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_text_is_scored_given_its_prompt_token_by_token(size: int) -> None:
    judge, prompts, texts = llama(), ["ab", "", "a longer one"], ["c", "déf gh", "<|eos|>"]
    found = judge_perplexity(judge, BYTES, texts, prompts=prompts, writer=None, batch_size=size)
    for prompt, text, nats in zip(prompts, texts, found.nats, strict=True):
        ids, want = [1, *BYTES.encode(prompt)], 0.0
        for token in BYTES.encode(text, split_special_tokens=True):
            want -= judge(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        assert nats == pytest.approx(want)
    assert found.sizes == tuple(len(text.encode()) for text in texts)
    assert found.tokens == found.sizes  # a token a byte; "<|eos|>" is spelled out, and no end of text


def test_a_long_prompt_is_cut_on_the_left() -> None:
    judge, text = llama(), "0123456789"
    whole = "x" * 90 + "y" * 21
    (long,) = judge_perplexity(judge, BYTES, [text], prompts=[whole], writer=None).nats
    (cut,) = judge_perplexity(judge, BYTES, [text], prompts=["y" * 21], writer=None).nats
    assert long == cut


def test_a_hybrid_may_judge_and_never_expects_a_mask() -> None:
    judge = tiny(1, vocab_size=len(BYTES), mask_token_id=0)
    (nats,) = judge_perplexity(judge, BYTES, ["hello"], writer=llama()).nats
    ids = torch.tensor([[1, *BYTES.encode("hello")]])
    assert nats == pytest.approx(float(ar_nll(judge, ids, torch.arange(6)[None] > 0)))


def test_a_model_judges_itself_only_when_that_is_said() -> None:
    judge, other = llama(), llama(1)
    copy = llama().to(torch.bfloat16)
    assert same_weights(judge, judge) and same_weights(judge, copy) and not same_weights(judge, other)
    for writer in (judge, copy):
        with pytest.raises(ValueError, match=r"judge: these are the weights that wrote the texts.*allow_self=True"):
            judge_perplexity(judge, BYTES, ["a"], writer=writer)
        assert judge_perplexity(judge, BYTES, ["a"], writer=writer, allow_self=True).own
    assert not judge_perplexity(judge, BYTES, ["a"], writer=other, allow_self=True).own


def test_a_judge_comes_from_a_folder(tmp_path: Path) -> None:
    judge = llama().float()
    judge.save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"judge: .*judge has no tokenizer"):
        load_judge(tmp_path / "judge")
    BYTES.save_pretrained(tmp_path / "judge")
    model, tokenizer = load_judge(tmp_path / "judge", dtype=torch.float32)
    assert same_weights(model, judge) and not model.training
    found = judge_perplexity(model, tokenizer, ["abc"], writer=None)
    assert found.nats == pytest.approx(judge_perplexity(judge, BYTES, ["abc"], writer=None).nats)
    with pytest.raises(ValueError, match="judge: there is no folder"):
        load_judge(tmp_path / "nowhere")
    BYTES.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"judge: .*words holds no causal model"):
        load_judge(tmp_path / "words")


def test_a_hybrid_folder_may_judge(tmp_path: Path) -> None:
    ours = tiny(1, vocab_size=len(BYTES), mask_token_id=0, bos_token_id=1, eos_token_id=1, pad_token_id=2)
    save_folder(ours, BYTES, tmp_path)
    model, tokenizer = load_judge(tmp_path)
    with pytest.raises(ValueError, match="weights that wrote"):
        judge_perplexity(model, tokenizer, ["abc"], writer=ours)


@pytest.mark.parametrize(("change", "said"), [
    ({"tokenizer": None}, "tokenizer is None"),
    ({"texts": ["a", ""]}, r"texts\[1\] is empty"),
    ({"texts": []}, "texts: there are 0"),
    ({"prompts": ["a", "b"]}, "texts: there are 1, and 2 prompts"),
    ({"texts": ["x" * 32]}, r"texts\[0\] has 32 .*context of 32"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"tokenizer": character_tokenizer("xyz")}, r"texts\[0\]: the judge's tokenizer cannot write it"),
    ({"judge": tiny(1, vocab_size=259, clean_attention="full")}, "judge: clean_attention='full'"),
])  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"judge": llama(), "tokenizer": BYTES, "texts": ["a"], "writer": None} | change
    with pytest.raises(ValueError, match=said):
        judge_perplexity(**given)


def test_a_text_must_begin_with_something() -> None:
    class Bare:
        bos_token_id = eos_token_id = unk_token_id = None
        all_special_tokens, all_special_ids = (), ()

        def encode(self, text: str, **options: Any) -> list[int]:
            return [ord(letter) for letter in text]

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(map(chr, ids))

    with pytest.raises(ValueError, match=r"prompts\[0\] is empty, and .*give a prompt"):
        judge_perplexity(llama(), Bare(), ["ab"], writer=None)
    assert judge_perplexity(llama(), Bare(), ["ab"], prompts=["c"], writer=None).tokens == (2,)


def test_unknown_characters_are_not_free() -> None:
    class Deaf:
        bos_token_id, eos_token_id, unk_token_id, unk_token = 1, 1, 2, "\2"
        all_special_tokens, all_special_ids = ("\1", "\2"), (1, 2)

        def encode(self, text: str, **options: Any) -> list[int]:
            return [2 if letter == "é" else ord(letter) for letter in text]

    with pytest.raises(ValueError, match=r"texts\[0\].*does not know"):
        judge_perplexity(llama(), Deaf(), ["aé"], writer=None)
