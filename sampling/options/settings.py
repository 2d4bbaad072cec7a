"""From the options of a call to a checked plan: one place for defaults and complaints."""


from hybrid import HybridConfig
from hybrid.common.checks import is_number, require
from hybrid.law import MODES, Law
from hybrid.sampling.choosing.borrowed import halt, warp
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import GUIDANCE
from hybrid.sampling.options.prompt import ends_of
from hybrid.sampling.options.rule import about_drafts, meant_rule, sub_block_size
from hybrid.sampling.reveal import Reveal
from hybrid.sampling.row import Plan
from hybrid.sampling.schemes import Ar, Windows
from hybrid.sampling.schemes.approximate import Approximate
from hybrid.sampling.schemes.guided import Guided
from hybrid.sampling.schemes.in_flight import InFlight
from hybrid.sampling.schemes.speculation import Fused, Linear, Speculative

DEFAULT_NEW_TOKENS = 128
BLOCK_ADD_THRESHOLD = 0.1  # what D2F, d3LLM and MBD-LM use most

# Options that have no part in some modes: those, and why.
ONE_BY_ONE = ("ar", "diffusion")  # or all at once: no windows
UNVERIFIED = ("ar", "block", "diffusion", "infill")
ELSEWHERE = {
    "block_size": (ONE_BY_ONE, "is the window of mode='block' and mode='speculative', and mode is {!r}: leave it out."),
    "fused": (UNVERIFIED, "is a way of mode='speculative', and mode is {!r}: leave it out."),
    "drafts_per_round": (UNVERIFIED, "is of mode='speculative', and mode is {!r}: leave it out."),
    "draft_adapter": (
        ("ar",), "is active while drafting, and mode={!r} drafts nothing: leave it out, or use another mode."
    ),
}  # fmt: skip


def plan_of(config: HybridConfig, given: Options, infill: bool = False) -> Plan:
    """The checked plan of a text.

    Args:
        given: what `merge` found.
        infill: gaps are filled, whatever the mode.

    Raises:
        ValueError: an option is out of range or does not go with the mode or the model; the message names it.
    """
    mode, law = _mode(config, given, infill)
    cache, guidance = _canvases(law, given, mode)
    size, asked = _block_size(law, config, given, mode), given.get("block_size") is not None
    chosen, reveal = meant_rule(given, mode)
    blocks, share = _in_flight(law, given, mode, chosen, reveal)
    drafts = _drafts(given) if mode == "speculative" else None
    return Plan(
        mode=mode,
        law=law,
        scheme=_scheme(given, mode, cache, guidance, blocks, drafts),
        block_size=1 if mode == "ar" else size,
        adaptive=mode == "speculative" and not asked,
        drafts=drafts,
        by_blocks=(not law.cached and mode == "block") or (mode == "infill" and asked),
        to_limit=not law.cached or mode in ("diffusion", "infill"),
        blocks_in_flight=blocks,
        block_add_threshold=share,
        reveal=reveal,
        foreign_reveal=callable(chosen),
        sub_block_size=sub_block_size(given, chosen),
        steps=given.get("steps_per_block"),
        eos=ends_of(config, given) if mode != "infill" else (),
        warp=warp(given),
        halt=halt(given),
        cache=cache,
        guidance=guidance,
    )


def _mode(config: HybridConfig, given: Options, infill: bool) -> tuple[str, Law]:
    """What is asked for, which the model must have and the other options go with, and the model's law then."""
    mode = "infill" if infill else given.get("mode", "ar")
    require(
        infill or (isinstance(mode, str) and mode in MODES),
        f"mode is {mode!r}; use one of {', '.join(map(repr, MODES))}.",
    )
    if (problem := Law.of(config).refusal(mode)) is not None:
        raise ValueError(problem)
    for name, (modes, why) in ELSEWHERE.items():
        require(name not in given.explicit or mode not in modes, f"{name} {why.format(mode)}")
    return mode, Law.of(config).of_mode(mode)


def _canvases(law: Law, given: Options, mode: str) -> tuple[str | None, float | None]:
    """Where a canvas is all there is: what of it is cached, and how far it is guided."""
    cache, guidance = given.get("cache"), given.get(GUIDANCE)
    known = cache is None or (isinstance(cache, str) and cache in ("prefix", "dual"))
    require(known, f"cache is {cache!r}; use 'prefix' or 'dual', or leave it out.")
    require(
        cache is None or (not law.cached and mode != "infill"),
        f"cache={cache!r} approximates where no cache is exact, which is clean_attention='full' in mode='block' and "
        f"mode='diffusion'; this is {law.clean_attention!r} in mode={mode!r}: leave it out.",
    )
    require(cache is None or given.get("use_cache", True), f"use_cache is False, and cache={cache!r} is one: choose.")
    require(
        guidance is None or (is_number(guidance) and guidance >= 0),
        f"{GUIDANCE} is {guidance!r}; it must be a number of at least 0, and 1 is no guidance.",
    )
    guidance = None if guidance == 1 else guidance
    require(cache is None or guidance is None, f"{GUIDANCE}: cache={cache!r} keeps one canvas, not two: leave one out.")
    return cache, guidance


def new_tokens(config: HybridConfig, given: Options, longest: int) -> int:
    """How many tokens there will be at most behind a prompt of `longest`.

    Raises:
        ValueError: the context has no room for them.
    """
    room = config.max_position_embeddings - longest
    require(
        room > 0,
        f"the prompt has {longest} tokens, and the context ends at {config.max_position_embeddings} "
        "(max_position_embeddings): shorten the prompt.",
    )
    count, most = given.whole("max_new_tokens"), given.whole("max_length", least=0)
    if count is None and most is not None:
        count = most - longest
        require(count > 0, f"max_length is {most}, and the prompt alone has {longest} tokens.")
    if count is None:
        return min(DEFAULT_NEW_TOKENS, room)
    require(
        count <= room,
        f"max_new_tokens is {count}, and behind a prompt of {longest} tokens the context of "
        f"{config.max_position_embeddings} has room for {room}.",
    )
    return int(count)


def _block_size(law: Law, config: HybridConfig, given: Options, mode: str) -> int:
    size: int = given.whole("block_size", config.block_size)
    require(
        size <= config.max_position_embeddings,
        f"block_size is {size}, larger than the context of {config.max_position_embeddings}.",
    )
    require(
        law.grid in (None, size),
        f"block_size is {size}, and this checkpoint's clean text attends on a grid of {config.block_size}: "
        "leave block_size out.",
    )
    require(
        mode != "speculative" or size >= 2,
        "mode='speculative' drafts block_size - 1 tokens: block_size must be at least 2.",
    )
    return size


def _drafts(given: Options) -> int | None:
    """The drafts of a speculative window at most; None: as many as the reveal rule takes."""
    count, named = given.whole("drafts_per_round"), about_drafts(given)
    require(
        count in (None, 1) or not given.get("fused", False),
        f"drafts_per_round is {count}, and fused speculation has one draft a round: leave one out.",
    )
    require(
        count != 1 or not named,
        f"{', '.join(named)}: drafts_per_round=1 shows all at once; give more, or leave one out.",
    )
    return count or (None if named else 1)


def _in_flight(
    law: Law, given: Options, mode: str, chosen: str | Reveal, reveal: Reveal
) -> tuple[int, float]:  # fmt: skip
    """How many blocks are drafted at once, and the share of the last one that is shown before the next joins."""
    count, share = given.whole("blocks_in_flight", 1), given.get("block_add_threshold", BLOCK_ADD_THRESHOLD)
    if mode != "block" or law.grid is None:
        require(
            count == 1 or "blocks_in_flight" not in given.explicit,
            f"blocks_in_flight is {count}, and only clean_attention='block' in mode='block' has blocks that see "
            f"unfinished ones before them; this is {law.clean_attention!r} in mode={mode!r}: leave it out.",
        )
        count = 1
    require(
        is_number(share) and 0 <= share <= 1,
        f"block_add_threshold is {share!r}; it must be a number in [0, 1].",
    )
    if count == 1:
        require(
            "block_add_threshold" not in given.explicit,
            "block_add_threshold says when a block joins those in flight: give blocks_in_flight too, or leave it out.",
        )
        return 1, share
    require(
        getattr(reveal, "can_wait", False),
        f"blocks_in_flight is {count}, and behind the first block only what a rule is sure of is shown, which "
        f"{'this function' if callable(chosen) else f'reveal={chosen!r}'} does not say (can_wait): use 'threshold' or "
        "'factor'.",
    )
    for name in ("sub_block_size", "draft_adapter"):
        require(
            given.get(name) is None,
            f"{name}: blocks in flight are clean blocks that are drafted together, and have no {name}: leave one out.",
        )
    return count, share


def _scheme(
    given: Options, mode: str, cache: str | None, guidance: float | None, blocks: int, drafts: int | None
) -> type[Ar]:  # fmt: skip
    """What spends the forwards: the mode's own scheme, or the user's, which is made from that."""
    own: type[Ar] = Ar if mode == "ar" else Windows
    if mode == "speculative":
        own = Fused if given.get("fused", False) else Speculative if drafts == 1 else Linear
    elif guidance is not None:
        own = Guided
    elif blocks > 1:
        own = InFlight
    elif cache is not None:
        own = Approximate
    if (chosen := given.get("scheme")) is None:
        return own
    require(
        isinstance(chosen, type) and issubclass(chosen, own),
        f"scheme is {chosen!r}; with mode={mode!r} it is a class made from {own.__module__}.{own.__name__}.",
    )
    return chosen
