"""Answers to a benchmark's requests: how likely a continuation is, and what the model writes up to a string.

Nothing here depends on the batch size, on the order of the requests or on which others there are: the masks of a bound
and the draws of sampling come from the seed and the request's own tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from hybrid import HybridForCausalLM, Layout
from hybrid.common.checks import require
from hybrid.evals.likelihood import bound
from hybrid.law import Law
from hybrid.sampling import GenerationStats, Request, decode_all
from hybrid.sampling.options.merge import merge
from hybrid.sampling.options.settings import plan_of
from hybrid.texts import written

LAWS = ("ar", "block", "masked")
# Arguments of `generate` that are set here, for each request. A limit of time would make results depend on the machine.
OWN = (
    "max_new_tokens", "max_length", "max_time", "stop_strings", "tokenizer", "generator", "num_return_sequences",
    "return_dict_in_generate", "output_scores", "streamer", "past_key_values", "watchers",
)  # fmt: skip


def usual(model: HybridForCausalLM) -> tuple[str, str]:
    """How a model writes and how it scores unless it is told otherwise.

    Raises:
        ValueError: it can do neither.
    """
    law = Law.of(model.config)
    require(bool(law.modes), law.refusal("block") or "")
    return law.modes[0], law.likelihoods[0]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model that answers.

    Attributes:
        tokenizer: the model's.
        mode: how it writes: "ar", "block", "diffusion", "speculative" or "auto".
        likelihood: how it scores: "ar" exactly, "block" and "masked" by the bound of that law.
        likelihood_block_size: the window of likelihood="block"; None: the checkpoint's.
        samples: masks a request, for the bounds.
        seed: of masks and sampling.
        batch_size: of a bound, how many masks of one request at once.
        options: of `generate`, for everything that is written.
        stats: the ledger of every batch that was written.

    Raises:
        ValueError: something is out of range or not what the model can do; the message names it.
    """

    model: HybridForCausalLM
    tokenizer: Any
    mode: str
    likelihood: str
    likelihood_block_size: int | None = None
    samples: int = 32
    seed: int = 0
    batch_size: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    stats: list[GenerationStats] = field(default_factory=list)

    @classmethod
    def usual(cls, model: HybridForCausalLM, tokenizer: Any, **given: Any) -> "Answers":
        """As the model answers unless it is told otherwise: what is None is not given.

        Raises:
            ValueError: it can neither write nor score, or as above.
        """
        mode, likelihood = usual(model)
        told = {name: value for name, value in given.items() if value is not None}
        return cls(model=model, tokenizer=tokenizer, **({"mode": mode, "likelihood": likelihood} | told))

    def __post_init__(self) -> None:
        law, kind = Law.of(self.model.config), self.likelihood
        require(kind in LAWS, f"likelihood is {kind!r}; use one of {', '.join(map(repr, LAWS))}.")
        require(
            kind != "ar" or law.exact,
            f"likelihood='ar': this checkpoint has clean_attention={law.clean_attention!r}; use 'masked'"
            + (" or 'block'." if law.cached else "."),
        )
        require(
            kind != "block" or law.cached,
            "likelihood='block': a clean_attention='full' model has one window over all; use 'masked'.",
        )
        require(
            kind == "ar" or law.mask_token_id is not None,
            f"likelihood={kind!r}: a pure AR model has no bound (its mask_token_id is None); use 'ar'.",
        )
        size = self.likelihood_block_size
        require(
            size is None or kind == "block",
            f"likelihood_block_size is the window of likelihood='block', and likelihood is {kind!r}: leave it out.",
        )
        require(
            size is None or (size >= 1 and law.grid in (None, size)),
            f"likelihood_block_size is {size}; it must be at least 1, and the grid's {law.block_size} for models "
            "whose clean text attends in blocks.",
        )
        for name in ("samples", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        own = [name for name in OWN if name in self.options]
        require(not own, f"{', '.join(own)}: this is set for each request; leave it out (max_gen_toks= sets lengths).")
        self.check({"mode": self.mode, **self.options})

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError where `generate` would refuse these options."""
        found = merge(self.model, options)
        require(not found.theirs, f"{', '.join(sorted(found.theirs))}: only transformers' own decoding loop has this.")
        if options["mode"] != "auto":  # which mode that is depends on the batch
            plan_of(self.model.config, found)

    @property
    def ledger(self) -> GenerationStats | None:
        """Of all that was written, None where nothing was: tokens and forwards, and no time."""
        if not self.stats:
            return None
        return GenerationStats(self.stats[0].mode, [row for each in self.stats for row in each.rows])

    def seed_of(self, tokens: list[int], turn: int = 0) -> int:
        """Of one request: its tokens decide, and its turn where the same request is asked again."""
        key = hashlib.blake2b(json.dumps([self.seed, turn, tokens]).encode(), digest_size=8).digest()
        return int.from_bytes(key, "little") >> 2

    # --- Scoring ------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each (given, scored): log p in nats, or minus the mean bound, and whether greedy decoding by the same
        law would write it (of the bounds, in the modes "block" and "diffusion")."""
        return self._exact(rows) if self.likelihood == "ar" else [self._bound(*row) for row in rows]

    @torch.no_grad()
    def _exact(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([*a, *b]) for a, b in rows], batch_first=True)
        places = torch.arange(ids.shape[1], device=self.model.device)[None]
        logits = self.model(ids.to(self.model.device), layout=Layout.causal(places)).logits
        law, found = Law.of(self.model.config), []
        for row, (given, scored) in zip(logits, rows, strict=True):
            goal = torch.tensor(scored, device=row.device)
            wide = law.without_mask(row[len(given) - 1 : len(given) + len(scored) - 1]).double()
            nats = F.cross_entropy(wide, goal, reduction="sum")
            found.append((-float(nats), bool((wide.argmax(-1) == goal).all())))
        return found

    def _bound(self, given: list[int], scored: list[int]) -> tuple[float, bool]:
        config, count = self.model.config, len(scored)
        window = (self.likelihood_block_size or config.block_size) if self.likelihood == "block" else None
        ids = torch.tensor([[*given, *scored]]).expand(self.samples, -1)
        target = (torch.arange(ids.shape[1]) >= len(given)).expand_as(ids)
        draws = bound(
            self.model, ids, target, block_size=window, seed_tokens=Law.of(config).seeds and window is not None,
            samples=1, seed=self.seed_of(given), batch_size=self.batch_size,
        )  # fmt: skip
        options: dict[str, Any] = {"mode": "diffusion", "do_sample": False}
        if window is not None:
            options |= {"mode": "block", "block_size": window}
        (tokens,), _, _ = self._generate([given], count, [], options, [0])
        return -float(draws.mean()), tokens == scored

    # --- Writing ------------------------------------------------------------------------------------------

    def write(
        self, rows: list[list[int]], count: int, until: list[str], options: dict[str, Any], seeds: list[int]
    ) -> list[str]:
        """Continue each row by at most `count` tokens, to just before the first of the strings `until`; `options`
        are those of `generate`, one seed a row."""
        found = []
        tokens, ends, stats = self._generate(rows, count, until, options, seeds)
        self.stats.append(stats)
        for row, new, seed in zip(rows, tokens, seeds, strict=True):
            # `generate` also stops where the prompt's end and the answer's beginning make up a string between them;
            # only what is in the answer counts here, so it goes on.
            while len(new) < count and new[-1] not in ends and _cut(self._text(new, row), until) is None:
                (more,), _, stats = self._generate(
                    [row + new], count - len(new), until, options, [seed + len(new)]
                )  # fmt: skip
                self.stats.append(stats)
                new = new + more
            parts = written(self.tokenizer, new, after=row)
            left, text = _cut("".join(part for part, _ in parts), until), ""
            for part, special in parts:
                kept = part if left is None else part[:left]
                left = None if left is None else left - len(kept)
                text += "" if special else kept  # one that the model spelled is text
            found.append(text)
        return found

    def _text(self, tokens: list[int], after: list[int]) -> str:
        return "".join(part for part, _ in written(self.tokenizer, tokens, after))

    def _generate(
        self, rows: list[list[int]], count: int, until: list[str], options: dict[str, Any], seeds: list[int]
    ) -> tuple[list[list[int]], tuple[int, ...], GenerationStats]:
        """New tokens of each row, the ids that end a text, and the ledger."""
        stop: dict[str, Any] = {"stop_strings": until, "tokenizer": self.tokenizer} if until else {}
        found, stats = decode_all(
            self.model, [Request(row, seed=seed) for row, seed in zip(rows, seeds, strict=True)], slots=len(rows),
            max_new_tokens=count, **stop, **options,
        )  # fmt: skip
        ends = merge(self.model, options).get("eos_token_id", self.model.config.eos_token_id)
        return [done.tokens for done in found], tuple(ends) if isinstance(ends, list | tuple) else (ends,), stats


def _cut(text: str, until: Sequence[str]) -> int | None:
    """Where the first of the strings begins; None: nowhere."""
    return min((at for word in until if (at := text.find(word)) >= 0), default=None)
