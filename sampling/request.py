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
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import LENGTHS, merge
from hybrid.sampling.options.settings import new_tokens, plan_of, watched
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


def checked_ids(model: HybridForCausalLM, ids: Sequence[int] | Tensor, infill: bool) -> list[int]:
    """The tokens of a request, held against the vocabulary.

    Raises:
        ValueError: they are none, or not in the vocabulary, or there is a mask token where none may be, or none where
            one must be.
    """
    found: Any = ids.tolist() if hasattr(ids, "tolist") else ids  # a tensor, or an array
    require(
        isinstance(found, list | tuple | range) and all(isinstance(i, int) and not isinstance(i, bool) for i in found),
        f"ids is a {type(ids).__name__}; pass token ids, a list of whole numbers or a tensor [length].",
    )
    text, config = list(found), model.config
    require(bool(text), "ids is empty; begin with at least one token (bos).")
    bad = next((i for i, token in enumerate(text) if not 0 <= token < config.vocab_size), None)
    require(
        bad is None,
        f"ids[{bad}] is {text[bad or 0]}, outside the vocabulary (0 to {config.vocab_size - 1}): was the text "
        "tokenised with this checkpoint's tokenizer?",
    )
    masked = config.mask_token_id is not None and config.mask_token_id in text
    require(not infill or masked, f"ids has no mask token ({config.mask_token_id}), so there is nothing to fill.")
    require(
        infill or not masked,
        f"ids has the mask token ({config.mask_token_id}): text is continued to the right; leave the mask token out, "
        "or fill gaps with mode='infill'.",
    )
    return text


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
    drawn = any(given.get(name) is not None for name in ("temperature", "top_k", "top_p", "min_p"))
    if drawn and given.get("do_sample") is None:
        given["do_sample"] = True
    options = merge(model, {**given, "return_dict_in_generate": True}, infill)
    options = replace(options, explicit=options.explicit & (explicit | {"return_dict_in_generate"}))
    require(not options.theirs, f"{', '.join(sorted(options.theirs))}: only generate with mode='ar' has this.")
    return options, plan_of(model.config, options, infill)


def row_of(
    model: HybridForCausalLM, request: Request, index: int, defaults: dict[str, Any]
) -> tuple[Row, list[Watcher]]:
    """The row of a request, and who watches it.

    Raises:
        ValueError: something is out of range or does not go together; the message names it.
    """
    options, plan = options_of(model, request.options, defaults)
    infill = plan.mode == "infill"
    text = checked_ids(model, request.ids, infill)
    generator = request.generator
    require(
        generator is None or isinstance(generator, torch.Generator),
        f"generator is a {type(generator).__name__}; pass a torch.Generator.",
    )
    whole = isinstance(request.seed, int) and not isinstance(request.seed, bool)
    require(
        request.seed is None or (whole and abs(request.seed) < 2**63 and generator is None),
        f"seed is {request.seed!r}; it is a whole number below 2^63, and no generator stands beside it.",
    )
    if generator is None:
        generator = torch.Generator()
        _ = generator.seed() if request.seed is None else generator.manual_seed(request.seed)
    if infill:
        most = model.config.max_position_embeddings
        require(len(text) <= most, f"ids: the text has {len(text)} tokens, more than the context of {most}.")
        length, limit = text.index(model.config.mask_token_id), len(text)
    elif request.score_prompt and options.get("max_new_tokens") == 0:
        most = model.config.max_position_embeddings
        require(len(text) <= most, f"ids: the text has {len(text)} tokens, more than the context of {most}.")
        length = limit = len(text)
    else:
        length, limit = len(text), len(text) + new_tokens(model.config, options, len(text))
    copied = index > 0 and "logits_processor" not in request.options
    row, watchers = made(model, plan, options, text, length, limit, index, generator, copied)
    if request.likeliest is not None or request.score_prompt:
        row.record = _chances(row, request)
    return row, watchers


def _chances(row: Row, request: Request) -> Record:
    """What writes down the chances that a request asks for."""
    count, before = request.likeliest, row.record
    require(is_whole(count), f"likeliest is {count!r}; use a whole number: how many tokens to write down.")
    require(
        not request.score_prompt or (row.seeded and row.law.exact and not row.law.probed),
        "score_prompt: the prompt of this model, in this mode, is not read from left to right, so that no forward over "
        "it says how likely each of its tokens is: leave it out, or use mode='ar' where the model has it.",
    )
    scores = before is not None and before.want_scores
    return Record(row.length, row.limit, scores, row.plan.warp, count, request.score_prompt)


def made(
    model: HybridForCausalLM, plan: Plan, options: Options, text: list[int], length: int, limit: int, index: int,
    generator: torch.Generator, copied: bool,
) -> tuple[Row, list[Watcher]]:  # fmt: skip
    """A row with this plan, and who watches it; `copied`: its processors are another row's, too."""
    asked, ours = processors(options, length, plan.eos, copied)
    backward = any(map(looks_back, asked))
    require(
        not backward or plan.blocks_in_flight == 1,
        f"{', '.join(type(p).__name__ for p in asked if looks_back(p))}: it looks at the text before a token, and "
        "blocks in flight are drafted before that is known: leave one out.",
    )
    scores, watchers = watched(options)
    law, streamer = plan.law, options.get("streamer")
    row = Row(
        plan=plan, law=law, index=index, text=text, length=length, limit=limit, generator=generator,
        device=model.device, processors=asked, guessing=LogitsProcessorList(asked[:ours]),
        looks_back=backward,
        record=Record(length, limit, scores, plan.warp) if scores or watchers or streamer is not None else None,
    )  # fmt: skip
    if streamer is not None:
        streaming = Streaming(streamer, law.mask_token_id if law.mask_token_id is not None else 0)
        watchers.append(streaming)
        try:
            streaming.begin(text[:length])
        except Exception as error:
            row.error = error
    return row, watchers
