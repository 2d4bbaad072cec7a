"""The layouts that decoding needs again and again, for a text that begins at 0: `Layout.moved` puts them in place."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

from hybrid import Layout
from hybrid.law import Law

P = ParamSpec("P")
R = TypeVar("R")


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """Makes each layout once, of as many as are kept: prompts come in all lengths."""
    return cast(Callable[P, R], functools.lru_cache(512)(torch.inference_mode(False)(make)))


@kept
def clean(law: Law, width: int) -> Layout:
    """Clean text of `width` tokens."""
    return law.clean(torch.arange(width)[None])


@kept
def window(law: Law, width: int, begin: int = 0) -> Layout:
    """A window of `width` slots that begins at `begin`."""
    return law.window(torch.arange(begin, begin + width)[None])


@kept
def twice(law: Law, width: int) -> Layout:
    """A window, and beside it another of the same positions; neither sees the other."""
    one = window(law, width)
    return one.cat(Layout.of(one.position, one.block, one.stream, doc=1))


@kept
def clean_and_next(law: Law, width: int) -> Layout:
    """A clean window, and the one that follows it."""
    return clean(law, width).cat(window(law, width, width))


@kept
def said(law: Law, width: int) -> Layout:
    """Clean text of `width` tokens, with what asks for the token after each."""
    return law.said(torch.arange(width)[None])


@kept
def rooted(law: Law, masks: int) -> Layout:
    """A clean token with what asks for the next, and masks behind it."""
    return said(law, 1).cat(window(law, masks, 1)) if masks else said(law, 1)


@kept
def answers(law: Law, width: int) -> list[int]:
    """The row that answers each slot of a window."""
    return law.reads(window(law, width))[0].tolist()


@kept
def outcomes(law: Law, width: int, following: int) -> Layout:
    """A clean window with what asks for the tokens after it, and behind that a window of `following` slots for each
    number of drafts that may be kept."""
    assumed = torch.arange(width)[:, None]
    begin = (assumed + 1).expand(-1, following)
    position = begin + torch.arange(following)
    position, begin = position.reshape(1, -1), begin.reshape(1, -1)
    streams = Layout.of(position, begin, begin)
    return said(law, width).cat(streams)
