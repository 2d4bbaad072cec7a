"""From the options of a call to a checked plan: one place for defaults and complaints."""

from collections.abc import Mapping, Sequence

from hybrid import HybridConfig
from hybrid.common.checks import is_number, is_whole, require
from hybrid.law import MODES, Law
from hybrid.sampling.choosing.borrowed import halt, warp
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import GUIDANCE
from hybrid.sampling.options.prompt import ends_of
from hybrid.sampling.reveal import Reveal, options, rule, rules
from hybrid.sampling.row import Plan
from hybrid.sampling.schemes import Ar, Windows
from hybrid.sampling.schemes.approximate import Approximate
from hybrid.sampling.schemes.guided import Guided
from hybrid.sampling.schemes.in_flight import InFlight
from hybrid.sampling.schemes.speculation import Fused, Linear, Speculative

# Options that several reveal rules have, and the rule that each of them means where none is named.
MEANT = {"steps_per_block": "steps", "confidence_threshold": "threshold", "noise_schedule": "ancestral"}

DEFAULT_NEW_TOKENS = 128
BLOCK_ADD_THRESHOLD = 0.1  # what D2F, d3LLM and MBD-LM use most


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
    chosen = _chosen_rule(given, mode)
    reveal, blocks = _reveal(given, chosen), _blocks_in_flight(law, given, mode)
    _check_in_flight(given, blocks, reveal, chosen)
    return Plan(
        mode=mode,
        law=law,
        scheme=_scheme(given, mode, cache, guidance, blocks),
        block_size=1 if mode == "ar" else size,
        adaptive=mode == "speculative" and not asked,
        drafts=_drafts(given, mode),
        by_blocks=(not law.cached and mode == "block") or (mode == "infill" and asked),
        to_limit=not law.cached or mode in ("diffusion", "infill"),
        blocks_in_flight=blocks,
        block_add_threshold=given.get("block_add_threshold", BLOCK_ADD_THRESHOLD),
        reveal=reveal,
        foreign_reveal=callable(chosen),
        sub_block_size=_sub_block_size(given, chosen),
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
    require(infill or (isinstance(mode, str) and mode in MODES), f"mode is {mode!r}; use one of {_listed(MODES)}.")
    if (problem := Law.of(config).refusal(mode)) is not None:
        raise ValueError(problem)
    require(
        mode not in ("ar", "diffusion") or "block_size" not in given.explicit,
        f"block_size is the window of mode='block' and mode='speculative', and mode is {mode!r}: leave it out.",
    )
    require(
        mode == "speculative" or "fused" not in given.explicit,
        f"fused is a way of mode='speculative', and mode is {mode!r}: leave it out.",
    )
    require(
        mode != "ar" or "draft_adapter" not in given.explicit,
        "draft_adapter is active while drafting, and mode='ar' drafts nothing: leave it out, or use another mode.",
    )
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


def _listed(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words))


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
    count, most = given.get("max_new_tokens"), given.get("max_length")
    require(most is None or is_whole(most), f"max_length is {most!r}; it must be a whole number.")
    if count is None and most is not None:
        count = most - longest
        require(count > 0, f"max_length is {most}, and the prompt alone has {longest} tokens.")
    if count is None:
        return min(DEFAULT_NEW_TOKENS, room)
    require(is_whole(count, 1), f"max_new_tokens is {count!r}; it must be a whole number above 0.")
    require(
        count <= room,
        f"max_new_tokens is {count}, and behind a prompt of {longest} tokens the context of "
        f"{config.max_position_embeddings} has room for {room}.",
    )
    return int(count)


def _block_size(law: Law, config: HybridConfig, given: Options, mode: str) -> int:
    size = given.get("block_size", config.block_size)
    require(is_whole(size, 1), f"block_size is {size!r}; it must be a whole number above 0.")
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
    return int(size)


def _scheme(given: Options, mode: str, cache: str | None, guidance: float | None, blocks: int) -> type[Ar]:
    """What spends the forwards: the mode's own scheme, or the user's, which is made from that."""
    own: type[Ar] = Ar if mode == "ar" else Windows
    if mode == "speculative":
        own = Fused if given.get("fused", False) else Speculative if _drafts(given, mode) == 1 else Linear
    if cache is not None:
        own = Approximate
    if blocks > 1:
        own = InFlight
    if guidance is not None:
        own = Guided
    if (chosen := given.get("scheme")) is None:
        return own
    require(
        isinstance(chosen, type) and issubclass(chosen, own),
        f"scheme is {chosen!r}; with mode={mode!r} it is a class made from {own.__module__}.{own.__name__}.",
    )
    return chosen


def _chosen_rule(given: Options, mode: str) -> str | Reveal:
    """The name of the reveal rule, or the user's own function."""
    known = {name: options(name) for name in rules()}
    every = dict.fromkeys(option for own in known.values() for option in own)
    owners = {option: [name for name, own in known.items() if option in own] for option in every}
    asked = [option for option in owners if option in given.explicit]
    named = _named(given)
    require(
        not named or mode != "ar",
        f"{', '.join(named)}: this says how drafts are revealed, and mode='ar' drafts nothing; use mode='block' or "
        "mode='diffusion', or leave it out.",
    )
    require(
        not named or mode != "speculative" or not given.get("fused", False),
        f"{', '.join(named)}: this says how drafts are revealed one after the other, and fused speculation has one "
        "draft a round: leave one out.",
    )
    chosen = given.get("reveal")
    if "reveal" not in given.explicit and (chosen is None or any(chosen not in owners[option] for option in asked)):
        chosen = _meant(asked or [option for option in owners if given.get(option) is not None], owners)
    fitting = [option for option in asked if chosen in owners[option]]
    says = "reveal is " if "reveal" in given.explicit or not fitting else f"{fitting[0]} means reveal="
    for option in asked:
        require(
            option in fitting,
            f"{option} is an option of reveal={' or '.join(map(repr, owners[option]))}, and {says}"
            f"{'a function' if callable(chosen) else repr(chosen)}: leave one out.",
        )
    require(
        callable(chosen) or (isinstance(chosen, str) and chosen in known),
        f"reveal is {chosen!r}; use one of {', '.join(map(repr, known))}, or a function.",
    )
    return chosen


def _reveal(given: Options, chosen: str | Reveal) -> Reveal:
    if callable(chosen):
        return chosen
    values = {option: given.get(option) for option in options(chosen)}
    return rule(chosen, **{option: value for option, value in values.items() if value is not None})


def _sub_block_size(given: Options, chosen: str | Reveal) -> int | None:
    """How many slots of a block are filled before those behind them."""
    size = given.get("sub_block_size")
    counts = not callable(chosen) and "steps_per_block" in options(chosen)
    require(
        not counts or "sub_block_size" not in given.explicit,
        f"sub_block_size: reveal={chosen!r} spreads a whole block over its steps, and parts of it take as many as they "
        "need: use a rule such as 'threshold', or leave it out.",
    )
    require(
        size is None or is_whole(size, 1),
        f"sub_block_size is {size!r}; it must be a whole number above 0.",
    )
    return None if counts else size


def _blocks_in_flight(law: Law, given: Options, mode: str) -> int:
    """How many blocks are drafted at once."""
    count = given.get("blocks_in_flight", 1)
    require(
        isinstance(count, int) and count >= 1, f"blocks_in_flight is {count!r}; it must be a whole number above 0."
    )
    if mode == "block" and law.grid is not None:
        return int(count)
    require(
        count == 1 or "blocks_in_flight" not in given.explicit,
        f"blocks_in_flight is {count}, and only clean_attention='block' in mode='block' has blocks that see unfinished "
        f"ones before them; this is {law.clean_attention!r} in mode={mode!r}: leave it out.",
    )
    return 1


def _check_in_flight(given: Options, blocks: int, reveal: Reveal, chosen: str | Reveal) -> None:
    """What goes with several blocks in flight, and what goes with nothing else."""
    share = given.get("block_add_threshold", BLOCK_ADD_THRESHOLD)
    require(
        isinstance(share, int | float) and 0 <= share <= 1,
        f"block_add_threshold is {share!r}; it must be a number in [0, 1].",
    )
    require(
        blocks > 1 or "block_add_threshold" not in given.explicit,
        "block_add_threshold says when a block joins those in flight: give blocks_in_flight too, or leave it out.",
    )
    if blocks == 1:
        return
    require(
        getattr(reveal, "can_wait", False),
        f"blocks_in_flight is {blocks}, and behind the first block only what a rule is sure of is shown, which "
        f"{'this function' if callable(chosen) else f'reveal={chosen!r}'} does not say (can_wait): use 'threshold' or "
        "'factor'.",
    )
    for name in ("sub_block_size", "draft_adapter"):
        require(
            given.get(name) is None,
            f"{name}: blocks in flight are clean blocks that are drafted together, and have no {name}: leave one out.",
        )


def _named(given: Options) -> list[str]:
    """What the caller said about how drafts are revealed."""
    every = dict.fromkeys(option for name in rules() for option in options(name))
    return [option for option in (*every, "reveal", "sub_block_size") if option in given.explicit]


def _drafts(given: Options, mode: str) -> int | None:
    """The drafts of a speculative window at most; None: as many as the reveal rule takes."""
    require(
        mode == "speculative" or "drafts_per_round" not in given.explicit,
        f"drafts_per_round is of mode='speculative', and mode is {mode!r}: leave it out.",
    )
    if mode != "speculative":
        return None
    count, named = given.get("drafts_per_round"), _named(given)
    require(
        count is None or is_whole(count, 1),
        f"drafts_per_round is {count!r}; it must be a whole number above 0.",
    )
    require(
        count in (None, 1) or not given.get("fused", False),
        f"drafts_per_round is {count}, and fused speculation has one draft a round: leave one out.",
    )
    require(
        count != 1 or not named,
        f"{', '.join(named)}: drafts_per_round=1 shows all at once; give more, or leave one out.",
    )
    return count or (None if named else 1)


def _meant(wanted: Sequence[str], owners: Mapping[str, Sequence[str]]) -> str:
    """The rule that options mean where none is named: an option that one rule alone has names it."""
    if not wanted:
        return "threshold"
    sole = {option: owners[option][0] for option in wanted if len(owners[option]) == 1}
    meant = sole or {option: MEANT[option] for option in wanted}
    said = " and ".join(f"{option} means reveal={name!r}" for option, name in meant.items())
    require(len(set(meant.values())) == 1, f"{said}: leave one out, or name the rule that has them with reveal=.")
    return next(iter(meant.values()))
