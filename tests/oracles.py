"""Tiny random models, and slow, obvious answers written from what things mean rather than from the code."""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from hybrid import HybridConfig, HybridForCausalLM, KVCache, Layout
from hybrid.adapters.draft_head import DraftHead

torch.set_num_threads(1)  # tensors this small are not worth sharing out: threads would wait for one another

Label = tuple[int, int, int, int]  # position, block, stream, doc
label = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 2), st.integers(-1, 1))
VOCABULARY = 24
MASK = VOCABULARY - 1

# Every mode with every kind of model that has it.
COMBINATIONS = [
    (mode, clean, prediction)
    for clean, modes in {
        "causal": ("ar", "block", "diffusion", "speculative"),
        "block": ("block", "diffusion", "ar", "speculative"),
        "full": ("block", "diffusion"),
    }.items()
    for mode in modes
    for prediction in ("in_place", "next")
]


# --- The rule of visibility -----------------------------------------------------------------------


def sees(q: Label, k: Label) -> bool:
    """Whether q may see k, by the rule in words."""
    (_, q_block, q_stream, q_doc), (_, k_block, k_stream, k_doc) = q, k
    if q_doc != k_doc or k_doc < 0:
        return False
    clean_and_earlier = k_stream == 0 and k_block < q_block
    of_one_kind = k_block == q_block and k_stream == q_stream
    return clean_and_earlier or of_one_kind


def table(queries: Sequence[Label], keys: Sequence[Label]) -> list[list[bool]]:
    return [[sees(q, k) for k in keys] for q in queries]


def labels_of(layout: Layout, row: int = 0) -> list[Label]:
    position, block, stream, doc = layout.labels[:, row].tolist()
    return list(zip(position, block, stream, doc, strict=True))


def layout_of(*rows: Sequence[Label]) -> Layout:
    return Layout(torch.tensor([list(zip(*row, strict=True)) for row in rows]).transpose(0, 1))


def places(count: int, start: int = 0) -> Tensor:
    """Positions `[1, count]`."""
    return torch.arange(start, start + count)[None]


def two_streams(count: int, block_size: int, clean: str = "causal") -> Layout:
    """The training input: a noisy half in blocks, beside its clean half."""
    noisy = Layout.of(places(count), places(count) // block_size * block_size, stream=1)
    return noisy.cat(Layout.causal(places(count)) if clean == "causal" else Layout.blocks(places(count), block_size))


# --- Models and prompts ---------------------------------------------------------------------------


def roughen(model: PreTrainedModel) -> None:
    """Move biases and the weights of norms away from the 0 and 1 that they begin with, which would hide them.
    Reads global random state."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)


def tiny(
    seed: int = 0, *, dtype: torch.dtype = torch.float64, peaked: float = 0.0, **fields: Any
) -> HybridForCausalLM:
    """A random model whose logits differ well. `peaked` adds a direction that all embeddings share: the model
    then prefers a few tokens whatever it reads, and drafts are often right."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "mask_token_id": MASK, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "block_size": 4,
        "max_position_embeddings": 256, "initializer_range": 0.5,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HybridForCausalLM(HybridConfig(**{**settings, **fields})).eval()
        roughen(model)
        if peaked:
            model.model.embed_tokens.weight.data += peaked * torch.randn(model.config.hidden_size)
    return model.to(dtype)


def shaken(head: DraftHead, size: float = 0.4) -> DraftHead:
    """One that changes drafts a good deal."""
    source = torch.Generator().manual_seed(3)
    for weight in head.parameters():
        weight.data += size * torch.randn(weight.shape, generator=source, dtype=torch.float64).to(weight.dtype)
    return head


def head_by_hand(head: DraftHead, row: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Logits `[V]` of what follows a row `[C]` and tokens `[T, C]`: the formula of the head's docstring, in plain
    operations."""

    def norm(x: Tensor) -> Tensor:
        return x / x.pow(2).mean().sqrt()

    state = torch.zeros(len(head.bias), dtype=row.dtype)
    for token in tokens:
        inner = norm(row) @ head.from_row + head.bias + norm(token) @ head.from_token + state @ head.from_state
        state = inner / (1 + torch.exp(-inner))
    logits = torch.full((vocabulary,), -torch.inf, dtype=row.dtype)
    for word, logit in zip(head.ids.tolist(), state @ head.down @ head.say, strict=True):
        logits[word] = logit
    return logits


def texts(seed: int, lengths: Sequence[int], vocabulary: int = MASK) -> list[list[int]]:
    """Random rows without the mask token, which is the last of the default vocabulary."""
    random = Random(seed)
    return [[random.randrange(vocabulary) for _ in range(length)] for length in lengths]


def padded(rows: Sequence[Sequence[int]], pattern: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` with padding on the "left", on the "right" or in "holes" anywhere.
    What stands in the padding is random, the mask token included: nobody may look."""
    random = Random(seed)
    width = max(map(len, rows)) + (3 if pattern == "holes" else 0)
    ids = torch.tensor([[random.randrange(VOCABULARY) for _ in range(width)] for _ in rows])
    real = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        slots = {
            "left": range(width - len(row), width),
            "right": range(len(row)),
            "holes": sorted(random.sample(range(width), len(row))),
        }[pattern]
        ids[i, list(slots)] = torch.tensor(row)
        real[i, list(slots)] = 1
    return ids, real


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def continuations(output: Any, width: int) -> list[list[int]]:
    """Each row's new tokens, without the padding behind them; `width`: that of the input."""
    return [row[width : width + stats.tokens].tolist()
            for row, stats in zip(output.sequences, output.stats.rows, strict=True)]  # fmt: skip


def late(row: Sequence[int]) -> int:
    """The token that comes up for the first time after all others: an end of text that cuts little off."""
    return max(row, key=row.index)


# --- Decoding, slowly -----------------------------------------------------------------------------


@torch.no_grad()
def raw_logits(model: HybridForCausalLM, ids: Sequence[int], labels: Sequence[Label]) -> Tensor:
    """`[T, V]` from one forward without a cache and without a shortcut."""
    return model(torch.tensor([list(ids)]), layout=layout_of(labels)).logits[0]


def clean_labels(model: HybridForCausalLM, count: int) -> list[Label]:
    """Those of clean text from its beginning."""
    size = model.config.block_size
    block = {"causal": lambda i: i, "block": lambda i: i // size * size, "full": lambda i: 0}
    return [(i, block[model.config.clean_attention](i), 0, 0) for i in range(count)]


def never_mask(model: HybridForCausalLM, logits: Tensor) -> Tensor:
    logits = logits.clone()
    if model.config.mask_token_id is not None:
        logits[..., model.config.mask_token_id] = -torch.inf
    return logits


def said(model: HybridForCausalLM, text: Sequence[int]) -> Tensor:
    """What left to right says of the token behind `text`, logits `[V]`, from one forward without a cache. A block model
    has blocks of one then, and where it predicts in place, a mask asks."""
    ids, labels = list(text), [(i, i, 0, 0) for i in range(len(text))]
    if model.config.clean_attention == "block" and model.config.diffusion_prediction == "in_place":
        ids, labels = [*ids, model.config.mask_token_id], [*labels, (len(text), len(text), 1, 0)]
    return never_mask(model, raw_logits(model, ids, labels))[-1]


def next_token(model: HybridForCausalLM, text: Sequence[int]) -> int:
    """What a clean pass over the text says follows it."""
    return int(never_mask(model, raw_logits(model, text, clean_labels(model, len(text)))[-1]).argmax())


def slow_ar(model: HybridForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding of one row, from left to right."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(said(model, text).argmax()))
    return text[len(prompt) :]


def slow_windows(
    model: HybridForCausalLM, prompt: Sequence[int], count: int, mode: str, threshold: float
) -> list[int]:
    """Greedy `block` or `diffusion` decoding of one row, with every forward over the whole text."""
    config = model.config
    clean, size, following = config.clean_attention, config.block_size, config.diffusion_prediction == "next"
    text, limit = list(prompt), len(prompt) + count
    while len(text) < limit:
        if clean == "causal" or (clean == "block" and following and len(text) % size == 0):
            text.append(next_token(model, text))  # the seed
        start = {"causal": len(text) - 1, "block": len(text) // size * size, "full": 0}[clean]
        end = limit if mode == "diffusion" else len(text) + size if clean == "full" else start + size
        if clean == "full":  # the whole canvas is seen, and blocks are only an order
            canvas, end = limit, min(end, limit)
            labels = clean_labels(model, canvas)
        else:
            canvas = end
            labels = clean_labels(model, start) + [(i, start, 1, 0) for i in range(start, canvas)]
        tokens = text + [MASK] * (canvas - len(text))
        while MASK in tokens[:end]:
            logits = never_mask(model, raw_logits(model, tokens, labels))
            if following:
                logits = torch.stack([logits[i if i == start else i - 1] for i in range(canvas)])
            chances, guesses = logits.float().softmax(-1).max(-1)
            hidden = [i for i in range(end) if tokens[i] == MASK]
            best = max(hidden, key=chances.tolist().__getitem__)
            for i in hidden:
                if i == best or chances[i] >= threshold:
                    tokens[i] = int(guesses[i])
        text = tokens[:end]
    return text[len(prompt) : limit]


def slowly(
    model: HybridForCausalLM, prompt: Sequence[int], count: int, mode: str, threshold: float
) -> list[int]:
    """Greedy decoding of one row in any mode."""
    if mode in ("ar", "speculative"):
        return slow_ar(model, prompt, count)
    return slow_windows(model, prompt, count, mode, threshold)


def cached(model: HybridForCausalLM, rows: int, slots: int = 1) -> KVCache:
    return KVCache(model.config, rows, slots, model.device, model.dtype)
