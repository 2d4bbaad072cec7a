"""`decode`: many texts, a few at a time, each given back as soon as it has ended."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.sampling.request import Done, Request
from hybrid.sampling.session import Session
from hybrid.sampling.stats import GenerationStats

END: Any = object()  # of what gives requests


def decode(
    model: HybridForCausalLM, requests: Iterable[Request | Sequence[int] | torch.Tensor], *, slots: int = 16,
    budget: int | None = None, **options: Any,
) -> Iterator[Done]:  # fmt: skip
    """Continue every request; results come as they finish, `Done.index` says which request each belongs to.

    A request joins as soon as another ends, so short texts do not wait for long ones, and none is padded to another's
    length. What a request gets does not depend on which others there are.

        for done in decode(model, requests, slots=16, mode="speculative"):
            print(done.index, tokenizer.decode(done.tokens), done.stats.tokens_per_forward)

    Args:
        requests: any iterable, an endless one too: it is read only as places become free. A bare list of ids is a
            request with the options given here.
        slots: texts at once.
        budget, options: as of `Session`.

    Yields:
        One `Done` for each request. Where a function of the request's own raised, `Done.error` says so, and the others
        go on.

    Raises:
        ValueError: a request is refused; it is named by its number. What came before it is given back first.
    """
    return _results(Session(model, slots=slots, budget=budget, **options), requests)


def decode_all(
    model: HybridForCausalLM, requests: Iterable[Request | Sequence[int] | torch.Tensor], *, slots: int = 16,
    budget: int | None = None, on_done: Callable[[Done], object] = lambda done: None, **options: Any,
) -> tuple[list[Done], GenerationStats]:  # fmt: skip
    """`decode` to the end: the results in the order of the requests, and the ledger of all of them together.

    Args:
        requests, slots, budget, options: as of `decode`.
        on_done: is told of each result as it comes.

    Raises:
        Exception: what a function of a request's own raised.
        ValueError: a request is refused.
    """
    session, found = Session(model, slots=slots, budget=budget, **options), list[Done]()
    for done in _results(session, requests):
        if done.error is not None:
            raise done.error
        found.append(done)
        on_done(done)
    found.sort(key=lambda done: done.index)
    session.stats.finish([done.stats for done in found])
    return found, session.stats


def _results(session: Session, requests: Iterable[Request | Sequence[int] | torch.Tensor]) -> Iterator[Done]:
    source, refused, more = iter(requests), None, True
    try:
        while more or session.active or session.waiting:
            while more and session.free > 0:
                if (request := next(source, END)) is END:
                    more = False
                    break
                try:
                    session.admit(request)
                except ValueError as error:
                    refused, more = ValueError(f"request {session.count}: {error}"), False
                    refused.__cause__ = error
            yield from session.step()
        if refused is not None:
            raise refused
    finally:  # the caller, or what gives the requests, may have stopped early
        session.close()
