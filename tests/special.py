"""Tokenizers as other families have them: who puts special tokens, and who may spell them, differs."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hybrid.training.text.tokenizing import character_tokenizer, train_bpe

TEXTS = 9 * [
    "def add(a, b):\n    return a + b\n", "one two three <|mask|> four </s> five <s>", "  a b  c", "naïve café ☕ 漢字",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _byte_level(
    names: list[str], begin: str | None = None, end: str | None = None, **roles: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    around = [f"{begin}:0" if begin else "", "$A:0", f"{end}:0" if end else ""]
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, around)),
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in (begin, end) if name],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **roles)


def qwen() -> PreTrainedTokenizerFast:
    """No bos token at all; a text ends with <|endoftext|>, a message with <|im_end|>."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    return _byte_level(names, eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>")


def llama_3() -> PreTrainedTokenizerFast:
    """Puts its bos token before every text by itself."""
    names = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    return _byte_level(names, begin="<|begin|>", bos_token="<|begin|>", eos_token="<|end|>", mask_token="<|mask|>")


def both_ends() -> PreTrainedTokenizerFast:
    """Puts one before and one behind, as for training."""
    names = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    roles = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "mask_token": "<|mask|>"}
    return _byte_level(names, begin="<|begin|>", end="<|end|>", **roles)


def llama_2() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a space becomes part of a word, one more is put before the text, rare bytes stand alone."""
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*names, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXTS], trainer)
    # Bytes are no special tokens: they are only kept in the vocabulary.
    found = json.loads(tokenizer.to_str())
    found["added_tokens"] = [t for t in found["added_tokens"] if t["content"] in names]
    tokenizer = Tokenizer.from_str(json.dumps(found))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<|mask|>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def unigram() -> PreTrainedTokenizerFast:
    """Its special tokens are words of its vocabulary like others, so that even plain text is cut into them."""
    names = ["</s>", "<mask>", "<unk>", "<im>"]
    pieces = [(name, 0.0) for name in names]
    pieces += [(c, -3.0) for c in sorted({c for text in TEXTS for c in text} | set("<>/|_maskimstardp")) if c != " "]
    pieces += [("▁", -2.0), ("▁a", -2.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", mask_token="<mask>",
        chat_template=TEMPLATE.replace("<|im_start|>", "<im>").replace("<|im_end|>", "</s>"),
    )  # fmt: skip


def ours() -> PreTrainedTokenizerFast:
    """Trained here: has a bos token, which whoever builds a text puts before it."""
    found = train_bpe(TEXTS, 300)
    found.chat_template = TEMPLATE.replace("<|im_start|>", "<|eos|>").replace("<|im_end|>", "<|eos|>")
    return found


def characters() -> PreTrainedTokenizerFast:
    return character_tokenizer("".join(sorted({c for text in TEXTS for c in text} | set("|<>/_eospadimnrtuxb"))))


KINDS = {f.__name__: f for f in (qwen, llama_3, both_ends, llama_2, unigram, ours, characters)}
