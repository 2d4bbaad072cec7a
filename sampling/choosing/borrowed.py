"""What transformers has and this loop takes over as it is: warpers, processors that look at the text, criteria that
end a row."""

import copy
import functools
import math
from collections.abc import Collection
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, MaxTimeCriteria, StopStringCriteria
from transformers.generation import logits_process as theirs

from hybrid.common.checks import require
from hybrid.sampling.choosing.choice import Warp
from hybrid.sampling.options.checks import DRAWS, Options
from hybrid.sampling.row import Criterion


def warp(options: Options) -> Warp | None:
    """transformers' own warpers, in its order; None for greedy decoding."""
    temperature, top_p, min_p = (options.number(name) for name in ("temperature", "top_p", "min_p"))
    top_k = options.whole("top_k", least=0)
    require(
        temperature is None or (math.isfinite(temperature) and temperature >= 0),
        f"temperature is {temperature}; it must be a finite number above 0 (or 0 for greedy decoding).",
    )
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must lie in (0, 1].")
    require(min_p is None or 0 <= min_p <= 1, f"min_p is {min_p}; it must lie in [0, 1].")
    if not options.get("do_sample") or temperature == 0:
        for name in DRAWS:
            idle = name in options.explicit and not (name == "temperature" and temperature in (0, 1))
            require(not idle, f"{name} only matters when sampling: add do_sample=True, or leave it out.")
        return None
    return Warp(temperature, top_k, top_p, min_p)


# Processors that look at the scores and at how long the text is, and not at what it says.
BLIND = (
    theirs.EpsilonLogitsWarper, theirs.EtaLogitsWarper, theirs.ExponentialDecayLengthPenalty,
    theirs.ForcedBOSTokenLogitsProcessor, theirs.ForcedEOSTokenLogitsProcessor, theirs.InfNanRemoveLogitsProcessor,
    theirs.LogitNormalization, theirs.MinLengthLogitsProcessor, theirs.MinNewTokensLengthLogitsProcessor,
    theirs.MinPLogitsWarper, theirs.SuppressTokensAtBeginLogitsProcessor, theirs.SuppressTokensLogitsProcessor,
    theirs.TemperatureLogitsWarper, theirs.TopHLogitsWarper, theirs.TopKLogitsWarper, theirs.TopPLogitsWarper,
    theirs.TypicalLogitsWarper,
)  # fmt: skip


def looks_back(processor: Any) -> bool:
    """Whether what a processor says may depend on the tokens before a slot."""
    if isinstance(processor, theirs.SequenceBiasLogitsProcessor):  # bad words are such, too
        return any(len(sequence) > 1 for sequence in processor.sequence_bias)
    return type(processor) not in BLIND


def processors(
    given: Options, length: int, eos: Collection[int], copied: bool = False
) -> tuple[LogitsProcessorList, int]:
    """transformers' own processors, for a row with a prompt of `length` tokens, and how many of them are made here: the
    caller's stand behind those. One that is an object may keep a state, so rows that share it get copies (`copied`)."""
    given.number("repetition_penalty")
    given.whole("no_repeat_ngram_size", least=0)
    least, made = given.whole("min_new_tokens", least=0), list[Any]()
    for name, build in (
        ("repetition_penalty", theirs.RepetitionPenaltyLogitsProcessor),
        ("no_repeat_ngram_size", theirs.NoRepeatNGramLogitsProcessor),
        ("sequence_bias", theirs.SequenceBiasLogitsProcessor),
        ("bad_words_ids", functools.partial(theirs.NoBadWordsLogitsProcessor, eos_token_id=list(eos))),
        ("suppress_tokens", theirs.SuppressTokensLogitsProcessor),
    ):
        value = given.get(name)
        value = value.tolist() if isinstance(value, Tensor) else value
        if value is None or (value == 1 if name == "repetition_penalty" else not value):
            continue
        try:
            made.append(build(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r}: {error}") from error
    if least and eos:
        made.append(theirs.MinNewTokensLengthLogitsProcessor(length, least, list(eos)))
    own = given.get("logits_processor") or []
    require(
        isinstance(own, list) and all(callable(p) for p in own),
        "logits_processor: pass a LogitsProcessorList (a list of functions of input_ids and scores).",
    )
    try:
        own = [copy.deepcopy(p) for p in own] if copied else list(own)
    except Exception as error:
        raise ValueError(f"logits_processor: for a second row it must be copied, and cannot be: {error}") from error
    return LogitsProcessorList([*made, *own]), len(made)


def halt(given: Options) -> list[Criterion]:
    """Everything that can end a row beside its end-of-text token and its limit."""
    own = given.get("stopping_criteria") or []
    require(
        isinstance(own, list) and all(callable(c) for c in own),
        "stopping_criteria: pass a StoppingCriteriaList (a list of functions of input_ids and scores).",
    )
    criteria = list(own)
    if (strings := given.get("stop_strings")) is not None:
        tokenizer = given.get("tokenizer")
        require(tokenizer is not None, "stop_strings needs the tokenizer: pass tokenizer=.")
        strings = [strings] if isinstance(strings, str) else strings
        good = isinstance(strings, Collection) and all(isinstance(s, str) and s for s in strings)
        require(good, "stop_strings: pass a string, or several; none empty.")
        try:
            criteria.append(StopStringCriteria(tokenizer, list(strings)))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"stop_strings: the tokenizer, a {type(tokenizer).__name__}, has none: {error}") from error
    if (seconds := given.number("max_time")) is not None:
        require(seconds > 0, f"max_time is {seconds!r}; use seconds above 0.")
        criteria.append(MaxTimeCriteria(seconds))
    return criteria
