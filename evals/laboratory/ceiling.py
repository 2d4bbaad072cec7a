"""How fast block decoding of a checkpoint could be, and how much of that each reveal rule reaches.

Windows are those of `mode="block"`, and the text before each is what serial decoding wrote (see `oracle` beside it).
Counted as in `GenerationStats`: settle forwards count in tokens_per_forward and are left out of tokens_per_draft. The
forwards of the search itself are no decoding and do not count.

Shapes: K window slots.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.common.checks import require
from hybrid.evals.laboratory.oracle import Canvas, Found, Look, See, search
from hybrid.evals.likelihood import written_nll
from hybrid.evals.measures import agreement, distinct, mean
from hybrid.law import Law
from hybrid.sampling import Canvas as Revealed
from hybrid.sampling import GenerationStats, Request, decode_all
from hybrid.sampling.choosing.borrowed import processors
from hybrid.sampling.choosing.choice import confidence
from hybrid.sampling.options.merge import merge
from hybrid.sampling.options.settings import new_tokens, plan_of


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What the oracle found for one block size.

    Attributes:
        outputs: new tokens of each prompt: the serial decode's, which the oracle reaches.
        oracle, serial: ledgers of the oracle, and of one token a draft.
        blocks: what was found for each.
    """

    block_size: int
    outputs: list[list[int]]
    oracle: GenerationStats
    serial: GenerationStats
    blocks: list[Found]

    def record(self) -> dict[str, Any]:
        """For the results document."""
        count = len(self.blocks)
        return {
            "block_size": self.block_size,
            "tokens_per_forward": self.oracle.tokens_per_forward,
            "tokens_per_draft": self.oracle.tokens_per_draft,
            "distinct_2": mean(map(distinct, self.outputs)),
            "prompts": len(self.outputs),
            "tokens_out": self.oracle.tokens,
            "blocks": count,
            "budget_exhausted_share": sum(found.exhausted for found in self.blocks) / count if count else 0.0,
            "optimal_share": sum(found.optimal for found in self.blocks) / count if count else 1.0,
            "search_forwards": sum(found.forwards for found in self.blocks),
        }


def ceiling(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], *, block_size: int, max_new_tokens: int,
    budget: int = 5000, exhaustive: bool = False, skip_wrong: bool = False, batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> Ceiling:  # fmt: skip
    """Decode every prompt serially in blocks, greedily, and search each block for the fewest drafts.

    Args:
        prompts: token ids of each, at least one.
        budget: forwards a block that the search may take (the paper's 5,000); where they end it, what was found by
            then counts.
        exhaustive, skip_wrong: as in `hybrid.evals.laboratory.oracle.search`.
        batch_size: canvases of a block in one forward.
        progress: told how many prompts are done.

    Raises:
        ValueError: no prompts, or an option is out of range or not what the model can do.
    """
    require(bool(prompts), "prompts: there are none; give at least one.")
    require(budget >= 0, f"budget is {budget}; it is a number of forwards, 0 or more.")
    require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1.")
    for number, prompt in enumerate(prompts):
        require(bool(len(prompt)), f"prompts[{number}] is empty; begin it with bos.")
    given: dict[str, Any] = {
        "mode": "block", "block_size": block_size, "do_sample": False, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    plan = plan_of(model.config, options := merge(model, given))
    require(
        not processors(options, 1, plan.eos)[0] and not plan.halt,
        "generation_config.json: the model's own settings change its choices (a penalty, suppressed tokens, a stop "
        "string); the ceiling is that of plain greedy decoding: take them out.",
    )

    def find(see: See, canvas: Canvas, limit: int) -> Found:
        return search(
            see, canvas, budget=budget, exhaustive=exhaustive, skip_wrong=skip_wrong, width=batch_size, ends=plan.eos,
            limit=limit,
        )  # fmt: skip

    oracle, serial = (GenerationStats("block", []) for _ in range(2))
    blocks, outputs = list[Found](), list[list[int]]()
    for done, prompt in enumerate(prompts):
        shown = _Oracle(model, prompt, new_tokens(model.config, options, len(prompt)), find)
        (text,), stats = decode_all(model, [Request(prompt, **given, reveal=shown)], slots=1, prefill=None)
        (row,), found = stats.rows, shown.found
        # What it decoded with one draft a window stands for as many as the search found.
        for ledger, drafts in ((oracle, [f.drafts for f in found]), (serial, [f.serial for f in found])):
            ledger.rows.append(replace(row, draft=row.draft - len(found) + sum(drafts)))
            ledger.prefill, ledger.settle = ledger.prefill + stats.prefill, ledger.settle + stats.settle
            ledger.draft += ledger.rows[-1].draft
        blocks += found
        outputs.append(text.tokens)
        progress(done + 1)
    return Ceiling(block_size=plan.block_size, outputs=outputs, oracle=oracle, serial=serial, blocks=blocks)


def reached(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], best: Ceiling, rules: dict[str, dict[str, Any]], *,
    max_new_tokens: int, batch_size: int = 16,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What each reveal rule makes of the same prompts.

    Beside its speeds stand the quality of the same outputs, their agreement with the serial text and the share that is
    the same throughout, its exact left-to-right likelihood in nats a token where the model has one, and distinct-2: a
    rule that changes the text may well be faster than the ceiling. The serial text itself is "one a draft".

    Args:
        rules: options of `generate` for each, by the name to show.
    """
    rules = {"one a draft": {"reveal": "steps"}, **rules}
    made = {}
    for name, options in rules.items():
        found, ledger = decode_all(
            model, [Request(prompt) for prompt in prompts], slots=batch_size, mode="block", block_size=best.block_size,
            do_sample=False, max_new_tokens=max_new_tokens, **options,
        )  # fmt: skip
        tokens = [done.tokens for done in found]
        pairs = list(zip(tokens, best.outputs, strict=True))
        speed, limit = ledger.tokens_per_forward, best.oracle.tokens_per_forward
        made[name] = {
            "options": options,
            "tokens_per_forward": speed,
            "tokens_per_draft": ledger.tokens_per_draft,
            "of_ceiling": speed / limit if speed and limit else None,
            "agreement": statistics.mean(agreement(*pair) for pair in pairs),
            "exact": statistics.mean(mine == target for mine, target in pairs),
            "ar_nats_per_token": _left_to_right(model, prompts, tokens),
            "distinct_2": mean(map(distinct, tokens)),
        }
    return made


def _left_to_right(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> float | None:
    if not Law.of(model.config).exact:
        return None
    return float(written_nll(model, prompts, tokens).sum()) / max(1, sum(map(len, tokens)))


class _Oracle:
    """A reveal rule that searches each window before it shows all of it at once.

    It knows the text by itself: the prompt, and what it has shown. A canvas that the search asks about is a private
    stream behind it, so that one forward sees many.
    """

    def __init__(
        self, model: HybridForCausalLM, prompt: Sequence[int], count: int, find: Callable[[See, Canvas, int], Found]
    ) -> None:
        self.model, self.law, self.find = model, Law.of(model.config), find
        self.text, self.limit = list(prompt), len(prompt) + count
        self.found: list[Found] = []
        self.cache = KVCache(model.config, 1, self.limit, model.device, model.dtype)

    def __call__(self, canvas: Revealed, logits: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(canvas.tokens[0].tolist(), canvas.hidden[0].tolist(), strict=True)
        given = [None if hidden else token for token, hidden in pairs]
        begin = self.law.begin(len(self.text)) if self.law.cached else len(self.text)
        self.text[begin:] = [token for token in given if token is not None]  # a seed is news
        self.found.append(self.find(lambda canvases: self._see(canvases, begin), given, self.limit - begin))
        target = self.found[-1].target
        self.text[begin:] = target
        tokens, hidden = canvas.tokens.clone(), canvas.hidden.clone()
        tokens[0, : len(target)] = torch.tensor(target, device=tokens.device)
        hidden[0, : len(target)] = False
        return tokens, hidden

    def _see(self, canvases: Sequence[Canvas], begin: int) -> list[Look]:
        mask, device, size = self.law.mask_token_id, self.model.device, len(canvases[0])
        assert mask is not None
        count, shown = len(canvases), [[mask if token is None else token for token in c] for c in canvases]
        width = size if self.law.cached else self.limit
        stream = torch.arange(1, count + 1, device=device).repeat_interleave(width)[None]
        if self.law.cached:
            self._settled(begin)
            window = self.law.window(torch.arange(begin, begin + size, device=device)[None])
        else:
            right = [mask] * (self.limit - begin - size)
            shown = [[*self.text[:begin], *row, *right] for row in shown]
            window = self.law.window(torch.arange(self.limit, device=device)[None])
        ids, many = torch.tensor([[t for row in shown for t in row]], device=device), window.labels.repeat(1, 1, count)
        layout = Layout(torch.cat([many[:2], stream[None], many[3:]]))
        logits = self.model(ids, layout=layout, past_key_values=self.cache if self.law.cached else None).logits
        logits = self.law.predictions(self.law.without_mask(logits).view(count, len(shown[0]), -1), window)
        if not self.law.cached:
            logits = logits[:, begin : begin + size]
        hidden = torch.tensor([[token is None for token in canvas] for canvas in canvases], device=device)
        guess = logits.argmax(-1)
        # As `Canvas.rank` of the reveal rules: ties go to the first slot.
        sure = confidence(logits, guess).masked_fill(~hidden, -torch.inf)
        order = sure.argsort(dim=1, descending=True, stable=True)
        counts = hidden.sum(1).tolist()
        return [
            Look(slots=tuple(slots[:n]), guesses=tuple(tokens[:n]))
            for slots, tokens, n in zip(order.tolist(), guess.gather(1, order).tolist(), counts, strict=True)
        ]

    def _settled(self, end: int) -> None:
        """Have the text before `end` in the cache."""
        (have,) = self.cache.lengths
        if have < end:
            position = torch.arange(have, end, device=self.model.device)[None]
            ids = torch.tensor([self.text[have:end]], device=self.model.device)
            self.model.model.states(ids, self.law.clean(position), self.cache)
            self.cache.commit(end - have)
