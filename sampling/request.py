"""What a session is asked for, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from hybrid import HybridForCausalLM
from hybrid.common.checks import is_whole, require
from hybrid.sampling.choosing.borrowed import looks_back, processors
from hybrid.sampling.options.checks import DRAWS, Options
from hybrid.sampling.options.merge import LENGTHS, merge
from hybrid.sampling.options.prompt import problem_of
from hybrid.sampling.options.settings import new_tokens, plan_of
from hybrid.sampling.record import Chance, Record, Streaming, Watcher
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.stats import RowStats

# Options of `generate` that are about a batch, a cache or a model, and not about one text.
OTHERS = ("num_return_sequences", "return_dict_in_generate", "draft_adapter", "auto_allow", "pad_token_id", "use_cache")
OF_A_MODE = ("cache", "scheme")  # options of a session that are not meant for requests of another mode


class Request:
    """One text to be continued, or with mode="infill" to be filled.

    Args:
        ids: its tokens, a list or an int64 `[T]` tensor.
        seed: of its draws when sampling; None: a fresh one.
        generator: a `torch.Generator` instead of a seed.
        likeliest: write down the log-probability of each new token when it was revealed, and so many of the tokens
            that were likeliest then; None: nothing.
        score_prompt: the same for the tokens of the prompt, each under the law of what stands before it. Then
            max_new_tokens may be 0.
        options: those of `generate` that are about one text (max_new_tokens, eos_token_id, stop_strings, temperature,
            logits_processor, streamer, watchers, mode, block_size, reveal, …); what is left out is the session's. Any
            of temperature, top_k, top_p and min_p means that tokens are drawn, unless do_sample says otherwise.
    """

    def __init__(
        self, ids: Sequence[int] | Tensor, *, seed: int | None = None, generator: torch.Generator | None = None,
        likeliest: int | None = None, score_prompt: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.ids, self.seed, self.generator, self.options = ids, seed, generator, options
        self.likeliest, self.score_prompt = likeliest, score_prompt


@dataclass(frozen=True, kw_only=True)
class Done:
    """A text that has ended.

    Attributes:
        index: the number of its request, in the order in which they came.
        tokens: its new token ids; of mode="infill" the whole text.
        stats: its ledger.
        error: what a processor, criterion, watcher or rule of the request raised; `tokens` is what there was by then.
        log_probs: with `output_scores`, the model's log-probability of each new token when it was revealed; of
            mode="infill" for each position from the first gap on, 0 where a token was given.
        chances: with `likeliest`, of each new token; of mode="infill" of each that was filled.
        prompt_chances: with `score_prompt`, of each token of the prompt but the first.
    """

    index: int
    tokens: list[int]
    stats: RowStats
    error: Exception | None = None
    log_probs: list[float] | None = None
    chances: list[Chance] | None = None
    prompt_chances: list[Chance] | None = None


def _text_of(model: HybridForCausalLM, ids: Sequence[int] | Tensor, infill: bool) -> list[int]:
    """The tokens of a request.

    Raises:
        ValueError: they are none, or not in the vocabulary, or there is a mask token where none may be, or none where
            one must be.
    """
    found: Any = ids.tolist() if hasattr(ids, "tolist") else ids  # a tensor, or an array
    require(
        isinstance(found, list | tuple | range) and all(isinstance(i, int) and not isinstance(i, bool) for i in found),
        f"ids is a {type(ids).__name__}; pass token ids, a list of whole numbers or a tensor [length].",
    )
    text = list(found)
    if (problem := problem_of(model.config, text, infill)) is not None:
        index, words = problem
        raise ValueError(f"ids {words}" if index is None else f"ids[{index}] {words}")
    return text


def _generator_of(request: Request) -> torch.Generator:
    generator, seed = request.generator, request.seed
    require(
        generator is None or isinstance(generator, torch.Generator),
        f"generator is a {type(generator).__name__}; pass a torch.Generator.",
    )
    require(
        seed is None or (is_whole(seed, -(2**63) + 1) and seed < 2**63 and generator is None),
        f"seed is {seed!r}; it is a whole number below 2^63, and no generator stands beside it.",
    )
    if generator is None:
        generator = torch.Generator()
        _ = generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def options_of(model: HybridForCausalLM, own: dict[str, Any], defaults: dict[str, Any]) -> tuple[Options, Plan]:
    """The options in force for a request with its `own` ones in a session with these defaults, and its plan."""
    for name in OTHERS:
        require(name not in own and name not in defaults, f"{name} is no option of a single text: leave it out.")
    require(defaults.get("streamer") is None, "streamer: one shows one text: give each request its own.")
    given = {**defaults, **own}
    if given.get("mode") != defaults.get("mode"):
        given = {name: value for name, value in given.items() if name in own or name not in OF_A_MODE}
    # What a session says for a mode was checked when it was made, and gives way to what a request says.
    explicit = frozenset(own if own and "mode" in given else given)
    if infill := given.get("mode") == "infill":
        asked = [name for name in LENGTHS if name in explicit and given[name] is not None]
        require(not asked, f"{', '.join(asked)}: mode='infill' fills the gaps that are there; leave it out.")
        given = {name: value for name, value in given.items() if name not in (*LENGTHS, "mode")}
    drawn = any(given.get(name) is not None for name in DRAWS)
    if drawn and given.get("do_sample") is None:
        given["do_sample"] = True
    options = merge(model, {**given, "return_dict_in_generate": True}, infill)
    options = replace(options, explicit=options.explicit & (explicit | {"return_dict_in_generate"}))
    require(not options.theirs, f"{', '.join(sorted(options.theirs))}: only generate with mode='ar' has this.")
    return options, plan_of(model.config, options, infill)


def row_of(model: HybridForCausalLM, request: Request, index: int, defaults: dict[str, Any]) -> Row:
    """The row of a request.

    Raises:
        ValueError: something is out of range or does not go together; the message names it.
    """
    options, plan = options_of(model, request.options, defaults)
    infill, generator = plan.mode == "infill", _generator_of(request)
    text = _text_of(model, request.ids, infill)
    length, limit = len(text), len(text)
    if infill:
        length = text.index(model.config.mask_token_id)
    elif request.score_prompt and options.get("max_new_tokens") == 0:
        most = model.config.max_position_embeddings
        require(limit <= most, f"ids: the text has {limit} tokens, more than the context of {most}.")
    else:
        limit += new_tokens(model.config, options, length)
    copied = index > 0 and "logits_processor" not in request.options
    row = made(model, plan, options, text, length, limit, index, generator, copied)
    if request.likeliest is not None or request.score_prompt:
        _write_down(row, request)
    return row


def _write_down(row: Row, request: Request) -> None:
    """Let a row keep a record of the chances that a request asks for."""
    count = request.likeliest
    require(is_whole(count), f"likeliest is {count!r}; use a whole number: how many tokens to write down.")
    require(
        not request.score_prompt or (row.seeded and row.law.exact and not row.law.probed),
        "score_prompt: the prompt of this model, in this mode, is not read from left to right, so that no forward over "
        "it says how likely each of its tokens is: leave it out, or use mode='ar' where the model has it.",
    )
    row.record = row.record or Record(row.length, row.limit, False, row.plan.warp)
    row.record.likeliest, row.record.wants_prompt = count, request.score_prompt


def made(
    model: HybridForCausalLM, plan: Plan, options: Options, text: list[int], length: int, limit: int, index: int,
    generator: torch.Generator, copied: bool,
) -> Row:  # fmt: skip
    """A row with this plan; `copied`: its processors are another row's, too."""
    asked, ours = processors(options, length, plan.eos, copied)
    backward = any(map(looks_back, asked))
    require(
        not backward or plan.blocks_in_flight == 1,
        f"{', '.join(type(p).__name__ for p in asked if looks_back(p))}: it looks at the text before a token, and "
        "blocks in flight are drafted before that is known: leave one out.",
    )
    (scores, watchers), streamer = watched(options), options.get("streamer")
    row = Row(
        plan=plan, index=index, text=text, length=length, limit=limit, generator=generator, device=model.device,
        processors=asked, guessing=LogitsProcessorList(asked[:ours]), looks_back=backward,
        record=Record(length, limit, scores, plan.warp) if scores or watchers or streamer is not None else None,
    )  # fmt: skip
    row.watchers = watchers if streamer is None else [*watchers, Streaming(streamer, row.fill)]
    return row


def watched(given: Options) -> tuple[bool, list[Watcher]]:
    """Whether scores are kept, and who watches.

    Raises:
        ValueError: one of them cannot be told, or scores are asked for and would not come back.
    """
    scores, watchers = given.get("output_scores", False), given.get("watchers") or []
    require(
        isinstance(watchers, list | tuple) and all(callable(w) for w in watchers),
        "watchers: pass a list of functions of a list of steps (hybrid.sampling.Step).",
    )
    beside = given.get("return_dict_in_generate", False)
    require(
        not scores or beside or "output_scores" not in given.explicit,
        "output_scores: scores come back beside the tokens: add return_dict_in_generate=True.",
    )
    check_streamer(given.get("streamer"))
    return bool(scores and beside), list(watchers)


def check_streamer(streamer: Any) -> None:
    """Raises a ValueError unless it is one, or None."""
    require(
        streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end")),
        f"streamer is a {type(streamer).__name__}; pass one of transformers' streamers, or what has their put and end.",
    )
