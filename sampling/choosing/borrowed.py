"""What transformers has and this loop takes over as it is: warpers, processors that look at the text, criteria that
end a row."""

import copy
import math
from collections.abc import Collection
from typing import Any

from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hybrid.common.checks import is_number, is_whole, require
from hybrid.sampling.choosing.choice import Warp
from hybrid.sampling.options.checks import Options
from hybrid.sampling.row import Criterion


def warp(options: Options) -> Warp | None:
    """transformers' own warpers, in its order; None for greedy decoding."""
    temperature, top_k, top_p, min_p = (options.get(k) for k in ("temperature", "top_k", "top_p", "min_p"))
    for name in ("temperature", "top_p", "min_p"):
        value = options.get(name)
        require(value is None or is_number(value), f"{name} is {value!r}; it must be a finite number.")
    require(
        temperature is None or (math.isfinite(temperature) and temperature >= 0),
        f"temperature is {temperature}; it must be a finite number above 0 (or 0 for greedy decoding).",
    )
    require(top_k is None or is_whole(top_k), f"top_k is {top_k!r}; use a whole number >= 1.")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must lie in (0, 1].")
    require(min_p is None or 0 <= min_p <= 1, f"min_p is {min_p}; it must lie in [0, 1].")
    if not options.get("do_sample") or temperature == 0:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            idle = name in options.explicit and not (name == "temperature" and temperature in (0, 1))
            require(not idle, f"{name} only matters when sampling: add do_sample=True, or leave it out.")
        return None
    return Warp(temperature, top_k, top_p, min_p)


# Processors that look at the scores and at how long the text is, and not at what it says.
BLIND = (
    EpsilonLogitsWarper, EtaLogitsWarper, ExponentialDecayLengthPenalty, ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor, InfNanRemoveLogitsProcessor, LogitNormalization, MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor, MinPLogitsWarper, SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
    TypicalLogitsWarper,
)  # fmt: skip


def looks_back(processor: Any) -> bool:
    """Whether what a processor says may depend on the tokens before a slot."""
    if isinstance(processor, SequenceBiasLogitsProcessor):  # bad words are such, too
        return any(len(sequence) > 1 for sequence in processor.sequence_bias)
    return type(processor) not in BLIND


def processors(
    given: Options, length: int, eos: Collection[int], copied: bool = False
) -> tuple[LogitsProcessorList, int]:
    """transformers' own processors, for a row with a prompt of `length` tokens, and how many of them are made here: the
    caller's stand behind those. One that is an object may keep a state, so rows that share it get copies (`copied`)."""
    penalty, ngram, least = (given.get(k) for k in ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"))
    require(least is None or is_whole(least), f"min_new_tokens is {least!r}; use a whole number.")
    require(penalty is None or is_number(penalty), f"repetition_penalty is {penalty!r}; it must be a number.")
    require(ngram is None or is_whole(ngram), f"no_repeat_ngram_size is {ngram!r}; it must be a whole number.")
    made: list[Any] = []
    for name, wanted, build in (
        ("repetition_penalty", penalty not in (None, 1.0), RepetitionPenaltyLogitsProcessor),
        ("no_repeat_ngram_size", bool(ngram), NoRepeatNGramLogitsProcessor),
        ("sequence_bias", bool(given.get("sequence_bias")), SequenceBiasLogitsProcessor),
        ("bad_words_ids", bool(given.get("bad_words_ids")), lambda ids: NoBadWordsLogitsProcessor(ids, list(eos))),
        ("suppress_tokens", bool(given.get("suppress_tokens")), SuppressTokensLogitsProcessor),
    ):
        if wanted:
            try:
                made.append(build(given.get(name)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} is {given.get(name)!r}: {error}") from error
    own = given.get("logits_processor") or []
    require(
        isinstance(own, list) and all(callable(p) for p in own),
        "logits_processor: pass a LogitsProcessorList (a list of functions of input_ids and scores).",
    )
    first = [MinNewTokensLengthLogitsProcessor(length, least, list(eos))] if least and eos else []
    try:
        own = [copy.deepcopy(p) for p in own] if copied else list(own)
    except Exception as error:
        raise ValueError(f"logits_processor: for a second row it must be copied, and cannot be: {error}") from error
    return LogitsProcessorList([*made, *first, *own]), len(made) + len(first)


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
        strings = [strings] if isinstance(strings, str) else list(strings)
        require(all(isinstance(s, str) and s for s in strings), "stop_strings: pass a string, or several; none empty.")
        try:
            criteria.append(StopStringCriteria(tokenizer, strings))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"stop_strings: the tokenizer, a {type(tokenizer).__name__}, has none: {error}") from error
    if (seconds := given.get("max_time")) is not None:
        require(is_number(seconds) and seconds > 0, f"max_time is {seconds!r}; use seconds above 0.")
        criteria.append(MaxTimeCriteria(seconds))
    return criteria
