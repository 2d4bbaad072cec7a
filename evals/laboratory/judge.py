"""What another language model thinks of generated text: judge perplexity, with bits per byte beside it.

A judge likes what is likely, loops most of all, so read it beside `entropy`, `distinct` and `repetition`
(`hybrid.evals.measures`), and never compare numbers of two judges but in bits per byte: tokens differ in length.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.law import Law
from hybrid.texts import begin_of, encode_behind, encode_document, prefix_of


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Scores of N texts.

    Attributes:
        nats: -log p of each text given its prompt, by the judge.
        tokens: how many of the judge's tokens each text is.
        sizes: UTF-8 bytes of each text.
        own: whether the judge is the model that wrote the texts: say so wherever the numbers are shown.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    sizes: tuple[int, ...]
    own: bool

    @property
    def perplexity(self) -> float:
        """Per token of the judge, over all texts together: long texts weigh more."""
        return math.exp(sum(self.nats) / sum(self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Over all texts together."""
        return sum(self.nats) / math.log(2) / sum(self.sizes)

    @property
    def perplexities(self) -> tuple[float, ...]:
        """Of each text on its own."""
        return tuple(math.exp(nats / n) for nats, n in zip(self.nats, self.tokens, strict=True))


def load_judge(folder: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """A causal model and its tokenizer from a local folder; nothing is downloaded and no code in it is run.

    Args:
        options: of `from_pretrained` (`dtype=`, say).

    Raises:
        ValueError: no such folder, no causal model in it, or no tokenizer beside it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"judge: there is no folder {folder}; name one that holds a causal model and its tokenizer.")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"judge: {folder} has no tokenizer that loads; save the model's own beside it.") from error
    try:
        if AutoConfig.from_pretrained(folder, **local).model_type != HybridConfig.model_type:
            options["use_safetensors"] = True  # ours reads nothing else and takes no such argument
        model = AutoModelForCausalLM.from_pretrained(folder, **local, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"judge: {folder} holds no causal model that loads: {error}") from error
    return model.eval(), tokenizer


@torch.no_grad()
def judge_perplexity(
    judge: PreTrainedModel, tokenizer: Any, texts: Sequence[str], *, prompts: Sequence[str] | None = None,
    writer: torch.nn.Module | None, allow_self: bool = False, batch_size: int = 8,
) -> Judgement:  # fmt: skip
    """Score generated texts with another model, on its own tokenizer.

    Prompt and text are tokenised apart, so that exactly the text's bytes are scored. A prompt that does not fit the
    judge's context with its text is cut on the left.

    Args:
        judge: any transformers causal model.
        tokenizer: the judge's.
        prompts: what stood before each text; it is given and not scored. None: nothing.
        writer: the model that wrote the texts, or None where it is not at hand (a person, say).
        allow_self: score also with the writer's own weights, which like what they wrote; `own` then says so.
        batch_size: texts at once; it changes no score but by rounding.

    Raises:
        ValueError: no tokenizer, an empty text, a text that the judge cannot read or that is too long for it, or a
            judge that is the writer itself.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    if tokenizer is None:
        raise ValueError("tokenizer is None: pass the judge's own, which its perplexity is counted in.")
    if not texts or len(prompts) != len(texts):
        raise ValueError(f"texts: there are {len(texts)}, and {len(prompts)} prompts; give one of each, at least.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if isinstance(judge, HybridForCausalLM) and not Law.of(judge.config).exact:
        raise ValueError(
            f"judge: clean_attention={judge.config.clean_attention!r} has no left-to-right likelihood; "
            "use a causal model."
        )
    own = writer is not None and same_weights(judge, writer)
    if own and not allow_self:
        raise ValueError(
            "judge: these are the weights that wrote the texts, and a model likes its own words. Use another judge, "
            "or allow_self=True to have it said in the result."
        )
    pairs = zip(prompts, texts, strict=True)
    rows = [_row(judge, tokenizer, prompt, text, i) for i, (prompt, text) in enumerate(pairs)]
    nats: list[float] = []
    for at in range(0, len(rows), batch_size):
        nats += _nats(judge, rows[at : at + batch_size])
    return Judgement(
        nats=tuple(nats), tokens=tuple(len(text) for _, text in rows),
        sizes=tuple(len(text.encode(errors="replace")) for text in texts), own=own,
    )  # fmt: skip


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have the same parameters by name, up to the coarser of their number formats."""
    if a is b:
        return True
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(_same(left[name], right[name]) for name in left)


def _same(a: Tensor, b: Tensor) -> bool:
    dtype = min(a.dtype, b.dtype, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
    return a.shape == b.shape and torch.equal(a.to("cpu", dtype), b.to("cpu", dtype))


def _row(judge: PreTrainedModel, tokenizer: Any, prompt: str, text: str, number: int) -> tuple[list[int], list[int]]:
    """What is given, at least one token, and what is scored."""
    if not text:
        raise ValueError(f"texts[{number}] is empty: there is nothing to score; leave it out and count it apart.")
    given = _encoded(tokenizer, prompt, number, encode_document)
    scored = _encoded(tokenizer, text, number, encode_behind if prompt else encode_document)
    begin = begin_of(tokenizer)
    if not begin and not given:
        try:
            begin = [prefix_of(tokenizer)]
        except ValueError as error:
            raise ValueError(f"prompts[{number}] is empty, and {error} (The judge's: give a prompt.)") from error
    room = getattr(judge.config, "max_position_embeddings", None) or math.inf
    fixed = len(begin)
    if len(scored) + max(fixed, 1) > room:
        raise ValueError(
            f"texts[{number}] has {len(scored)} of the judge's tokens, and its context of {room} has no room for that "
            "and one before: shorten the texts, or use a judge with a longer context."
        )
    kept = int(min(len(given), room - fixed - len(scored)))
    return begin + given[len(given) - kept :], scored


def _encoded(tokenizer: Any, text: str, number: int, way: Callable[[Any, str, str], list[int]]) -> list[int]:
    try:
        ids = way(tokenizer, text, "the text")
    except ValueError as error:
        raise ValueError(f"texts[{number}]: the judge's tokenizer cannot write it ({error}).") from error
    unknown = tokenizer.unk_token_id
    if (text and not ids) or (unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids):
        raise ValueError(
            f"texts[{number}] or its prompt has characters that the judge's tokenizer does not know: its bits per "
            "byte would be too low. Use a judge that reads any text (byte-level)."
        )
    return ids


def _nats(judge: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    longest = max(len(given) + len(scored) for given, scored in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, goal = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (given, scored) in enumerate(rows):
        end = len(given) + len(scored)
        ids[i, :end], mask[i, :end] = torch.tensor(given + scored), 1
        goal[i, len(given) : end] = True
    logits = judge(input_ids=ids.to(judge.device), attention_mask=mask.to(judge.device)).logits.cpu()
    if isinstance(judge, HybridForCausalLM):
        logits = Law.of(judge.config).without_mask(logits)
    nll = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    # Not multiplied: what fills short rows may be the mask token, whose loss is infinite.
    found: list[float] = nll.view(len(rows), -1).where(goal[:, 1:], 0.0).sum(1).tolist()
    return found
