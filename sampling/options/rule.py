"""Which reveal rule a call means: by its name, by an option that it has, or by what is stored with the model."""

from collections.abc import Sequence

from hybrid.common.checks import require
from hybrid.sampling.options.checks import Options
from hybrid.sampling.reveal import Reveal, options, owners, rule, rules

# Options that several reveal rules have, and the rule that each of them means where none is named.
MEANT = {"steps_per_block": "steps", "confidence_threshold": "threshold", "noise_schedule": "ancestral"}


def about_drafts(given: Options) -> list[str]:
    """What the caller said about how drafts are revealed."""
    return [option for option in (*owners(), "reveal", "sub_block_size") if option in given.explicit]


def meant_rule(given: Options, mode: str) -> tuple[str | Reveal, Reveal]:
    """The name of the reveal rule, or the user's own function; and the rule itself.

    Raises:
        ValueError: options do not go together, or with the mode.
    """
    named = ", ".join(about_drafts(given))
    require(
        not named or mode != "ar",
        f"{named}: this says how drafts are revealed, and mode='ar' drafts nothing; use mode='block' or "
        "mode='diffusion', or leave it out.",
    )
    require(
        not named or mode != "speculative" or not given.get("fused", False),
        f"{named}: this says how drafts are revealed one after the other, and fused speculation has one draft a round: "
        "leave one out.",
    )
    chosen = _chosen(given)
    if callable(chosen):
        return chosen, chosen
    values = {option: given.get(option) for option in options(chosen)}
    return chosen, rule(chosen, **{option: value for option, value in values.items() if value is not None})


def _chosen(given: Options) -> str | Reveal:
    """The rule that has all the options that were asked for; what is stored gives way to them."""
    asked, chosen = [option for option in owners() if option in given.explicit], given.get("reveal")
    if "reveal" not in given.explicit and (chosen is None or any(chosen not in owners()[option] for option in asked)):
        chosen = _meant(asked or [option for option in owners() if given.get(option) is not None])
    fitting = [option for option in asked if chosen in owners()[option]]
    says = "reveal is " if "reveal" in given.explicit or not fitting else f"{fitting[0]} means reveal="
    for option in asked:
        require(
            option in fitting,
            f"{option} is an option of reveal={' or '.join(map(repr, owners()[option]))}, and {says}"
            f"{'a function' if callable(chosen) else repr(chosen)}: leave one out.",
        )
    require(
        callable(chosen) or (isinstance(chosen, str) and chosen in rules()),
        f"reveal is {chosen!r}; use one of {', '.join(map(repr, rules()))}, or a function.",
    )
    return chosen


def _meant(wanted: Sequence[str]) -> str:
    """The rule that options mean where none is named: an option that one rule alone has names it."""
    if not wanted:
        return "threshold"
    sole = {option: owners()[option][0] for option in wanted if len(owners()[option]) == 1}
    meant = sole or {option: MEANT[option] for option in wanted}
    said = " and ".join(f"{option} means reveal={name!r}" for option, name in meant.items())
    require(len(set(meant.values())) == 1, f"{said}: leave one out, or name the rule that has them with reveal=.")
    return next(iter(meant.values()))


def sub_block_size(given: Options, chosen: str | Reveal) -> int | None:
    """How many slots of a block are filled before those behind them; None: all at once.

    Raises:
        ValueError: it is no number of slots, or the rule counts the steps of a block.
    """
    counts = not callable(chosen) and "steps_per_block" in options(chosen)
    require(
        not counts or "sub_block_size" not in given.explicit,
        f"sub_block_size: reveal={chosen!r} spreads a whole block over its steps, and parts of it take as many as they "
        "need: use a rule such as 'threshold', or leave it out.",
    )
    size: int | None = given.whole("sub_block_size")
    return None if counts else size
