"""How fast block decoding of a checkpoint could be, and how much of that each reveal rule reaches.

Windows are those of `mode="block"`, and the text before each is what serial decoding wrote (`hybrid.evals.oracle`).
Counted as in `GenerationStats`: settle forwards count in tokens_per_forward and are left out of tokens_per_draft. The
forwards of the search itself are no decoding and do not count.

Shapes: K window slots, R rows of the cache.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.evals.oracle import Canvas, Found, Look, See, search
from hybrid.evals.quality import agreement, distinct
from hybrid.prediction import predictions, without_mask
from hybrid.sampling import GenerateOutput, GenerationStats
from hybrid.sampling.checks import require
from hybrid.sampling.choice import confidence
from hybrid.sampling.settings import merge, plan_of
from hybrid.sampling.stats import RowStats


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
        spread = [share for share in map(distinct, self.outputs) if share is not None]
        return {
            "block_size": self.block_size,
            "tokens_per_forward": self.oracle.tokens_per_forward,
            "tokens_per_draft": self.oracle.tokens_per_draft,
            "serial_tokens_per_forward": self.serial.tokens_per_forward,
            "serial_tokens_per_draft": self.serial.tokens_per_draft,
            "distinct_2": statistics.mean(spread) if spread else None,
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
        exhaustive, skip_wrong: as in `hybrid.evals.oracle.search`.
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
    rows = [_Row(model, prompt, block_size, max_new_tokens, batch_size) for prompt in prompts]

    def find(see: See, given: Canvas) -> Found:
        return search(see, given, budget=budget, exhaustive=exhaustive, skip_wrong=skip_wrong, width=batch_size)

    oracle, serial = (GenerationStats("block", []) for _ in range(2))
    blocks = []
    with model.model.flat(max(row.limit + row.size for row in rows)), torch.inference_mode():
        for done, row in enumerate(rows):
            found = row.run(find)
            blocks += found
            for ledger, drafts in ((oracle, sum(f.drafts for f in found)), (serial, sum(f.serial for f in found))):
                row.enter(ledger, drafts)
            progress(done + 1)
    return Ceiling(
        block_size=block_size, outputs=[row.new for row in rows], oracle=oracle, serial=serial, blocks=blocks
    )


def reached(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], best: Ceiling, rules: dict[str, dict[str, Any]], *,
    max_new_tokens: int, batch_size: int = 16,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What each reveal rule makes of the same prompts.

    Beside its speeds stand the quality of the same outputs, their agreement with the serial text and the share that is
    the same throughout, and distinct-2: a rule that changes the text may well be faster than the ceiling.

    Args:
        rules: options of `generate` for each, by the name to show.
    """
    found = {}
    for name, options in rules.items():
        ledger, tokens = GenerationStats("block", []), []
        for at in range(0, len(prompts), batch_size):
            rows = prompts[at : at + batch_size]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=model.device)
            real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
            out = model.generate(
                ids, real, mode="block", block_size=best.block_size, do_sample=False, max_new_tokens=max_new_tokens,
                return_dict_in_generate=True, **options,
            )  # fmt: skip
            assert isinstance(out, GenerateOutput) and out.sequences is not None and out.stats is not None
            ledger.rows += out.stats.rows
            new = zip(out.sequences, out.stats.rows, strict=True)
            tokens += [row[longest : longest + had.tokens].tolist() for row, had in new]
        pairs = list(zip(tokens, best.outputs, strict=True))
        spread = [share for share in map(distinct, tokens) if share is not None]
        speed, limit = ledger.tokens_per_forward, best.oracle.tokens_per_forward
        found[name] = {
            "options": options,
            "tokens_per_forward": speed,
            "tokens_per_draft": ledger.tokens_per_draft,
            "of_ceiling": speed / limit if speed and limit else None,
            "agreement": statistics.mean(agreement(*pair) for pair in pairs),
            "exact": statistics.mean(mine == target for mine, target in pairs),
            "distinct_2": statistics.mean(spread) if spread else None,
        }
    return found


class _Row:
    """One prompt, decoded window by window over a cache of R equal rows, one for each canvas of a forward."""

    def __init__(self, model: HybridForCausalLM, prompt: Sequence[int], size: int, count: int, rows: int) -> None:
        self.model, self.config, self.text = model, model.config, list(prompt)
        given = {"mode": "block", "block_size": size, "do_sample": False, "max_new_tokens": count}
        plan = plan_of(model.config, merge(model, given), [len(prompt)], None)
        require(
            not plan.chooser.processors and not plan.halt,
            "generation_config.json: the model's own settings change its choices (a penalty, suppressed tokens, a stop "
            "string); the ceiling is that of plain greedy decoding: take them out.",
        )
        self.size, self.eos, (self.limit,) = plan.block_size, plan.eos, plan.limits
        self.clean, self.count = model.config.clean_attention, rows
        self.seeds = self.clean == "causal" or (
            self.clean == "block" and model.config.diffusion_prediction == "next"
        )
        self.prefills = self.settles = self.free = self.carried = 0
        self.prompt = len(prompt)
        # Whole blocks are committed; of the others, what is known enters the window as shown slots.
        unit = self.size if self.clean == "block" else 1
        self.start = 0 if self.clean == "full" else self.prompt // unit * unit

    @property
    def new(self) -> list[int]:
        """Tokens that the caller gets."""
        return self.text[self.prompt :]

    def enter(self, ledger: GenerationStats, drafts: int) -> None:
        """This row in a ledger, its windows having taken so many drafts."""
        drafts -= self.carried
        ledger.rows.append(RowStats(tokens=len(self.new), free=self.free, settle=self.settles, draft=drafts))
        ledger.prefill += self.prefills
        ledger.settle += self.settles
        ledger.draft += drafts

    def _prefill(self) -> None:
        self.cache = KVCache(self.config, 1, self.limit + self.size, self.model.device, self.model.dtype)
        if self.start:
            logits = self._clean(self.text[: self.start], 0)
            self.prefills, self.free = 1, int(self.seeds and self.start == self.prompt)
            if self.free:
                self.text.append(int(logits[0, -1].argmax()))
        self.cache.select([0] * self.count)

    def run(self, find: Callable[[See, Canvas], Found]) -> list[Found]:
        """Decode to the end; what `find` finds for each window."""
        found: list[Found] = []
        self._prefill()
        fresh = len(self.text) - 1 if self.free else len(self.text)
        while not self._ended(fresh):
            begin = {"causal": len(self.text) - 1, "block": self.start, "full": len(self.text)}[self.clean]
            end = min(begin + self.size, self.limit) if self.clean == "full" else begin + self.size
            known = self.text[begin:]
            given = [*known, *[None] * (end - begin - len(known))]
            if None in given:
                found.append(find(lambda canvases, begin=begin: self._see(canvases, begin), given))  # type: ignore[misc]
                given = list(found[-1].target)
            fresh = len(self.text)
            self.text[begin:] = [token for token in given if token is not None]
            if self._ended(fresh) or self.clean == "full":
                continue
            logits = self._clean(self.text[begin:], begin)
            self.settles += 1
            self.start = begin + self.size
            if self.seeds:
                fresh = len(self.text)
                self.text.append(int(logits[0, -1].argmax()))
            else:
                self.carried += 1  # the forward that settles a block drafts the next one beside it
        return found

    def _ended(self, fresh: int) -> bool:
        """Whether the text is over, having cut it behind an end-of-text token at or after `fresh`."""
        stop = next((i + 1 for i in range(fresh, len(self.text)) if self.text[i] in self.eos), None)
        if stop is None and len(self.text) < self.limit:
            return False
        del self.text[min(self.limit, stop if stop is not None else self.limit) :]
        return True

    def _clean(self, tokens: list[int], begin: int) -> Tensor:
        """Commit clean text to every row of the cache; logits `[R, T, V]`."""
        self.cache.active = len(self.cache.lengths)
        place = torch.arange(begin, begin + len(tokens), device=self.model.device)[None]
        layout = Layout.clean(place, self.clean, self.config.block_size)
        ids = torch.tensor([tokens], device=self.model.device).expand(self.cache.active, -1)
        logits = self.model(ids, layout=layout, past_key_values=self.cache).logits
        self.cache.commit(len(tokens))
        return without_mask(logits, self.config)

    def _see(self, canvases: Sequence[Canvas], begin: int) -> list[Look]:
        mask, device = self.config.mask_token_id, self.model.device
        assert mask is not None
        size = len(canvases[0])
        rows = torch.tensor([[mask if t is None else t for t in canvas] for canvas in canvases], device=device)
        hidden = torch.tensor([[t is None for t in canvas] for canvas in canvases], device=device)
        if self.clean == "full":
            left = torch.tensor(self.text[:begin], device=device, dtype=torch.int64).expand(len(rows), -1)
            right = torch.full((len(rows), self.limit - begin - size), mask, device=device)
            rows = torch.cat([left, rows, right], 1)
            layout = Layout.bidirectional(torch.arange(self.limit, device=device)[None])
            logits = self.model(rows, layout=layout).logits
        else:
            self.cache.active = len(rows)
            layout = Layout.window(torch.arange(begin, begin + size, device=device)[None])
            logits = self.model(rows, layout=layout, past_key_values=self.cache).logits
        logits = predictions(without_mask(logits, self.config), layout, self.config)
        if self.clean == "full":
            logits = logits[:, begin : begin + size]
        guess = logits.argmax(-1)
        # As `Canvas.rank` of the reveal rules: ties go to the first slot.
        sure = confidence(logits, guess).masked_fill(~hidden, -torch.inf)
        order = sure.argsort(dim=1, descending=True, stable=True)
        counts = hidden.sum(1).tolist()
        return [
            Look(slots=tuple(slots[:n]), guesses=tuple(tokens[:n]))
            for slots, tokens, n in zip(order.tolist(), guess.gather(1, order).tolist(), counts, strict=True)
        ]
