"""The one thread that owns the session: jobs go in, news come out, and whoever is gone frees a place at the next step.

Requests wait here and not in the session, so that those of different users take turns.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid.sampling.options.checks import LogitsError
from hybrid.sampling.record import Step
from hybrid.sampling.request import Done, Request
from hybrid.sampling.row import Plan
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.metrics import Metrics
from hybrid.sampling.serve.protocol import ApiError
from hybrid.sampling.serve.text import LONGEST
from hybrid.sampling.session import Session

LOG = logging.getLogger("hybrid.serve")


class Decoder:
    """Decodes jobs in a thread of its own."""

    def __init__(
        self, make: Callable[[], Session], metrics: Metrics, *, max_queue: int,
        finished: Callable[[Job, Done], object] = lambda job, done: None,
    ) -> None:  # fmt: skip
        """`make`: a session. `finished`: is told of each text that was decoded to its end, in the thread."""
        self.make, self.metrics, self.max_queue, self.finished = make, metrics, max_queue, finished
        self.session = make()
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by user, the next one's turn first
        self._count = 0  # of those who wait
        self._gone: list[Job] = []
        self._stop: ApiError | None = None
        self._known: dict[int, Job] = {}
        self._news: list[tuple[Job, News | End]] = []
        self._pace = 0.0  # seconds of a text, of late
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        metrics.slots.set(self.session.slots)

    def start(self) -> None:
        self._thread.start()

    def stop(self, why: ApiError, wait: float = 10.0) -> None:
        """End all jobs with an error, and the thread."""
        with self._changed:
            self._stop = self._stop or why
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(wait)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._count

    @property
    def busy(self) -> int:
        """Texts that wait or are being decoded."""
        return self._count + len(self._known)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn: all of them, or none.

        Raises:
            ApiError: there is no room for so many, or the server is about to end.
        """
        with self._changed:
            if self._stop is not None:
                raise self._stop
            free = max(0, self.session.slots - len(self._known))
            if self._count + len(jobs) > self.max_queue + free:
                seconds = self.patience()
                raise ApiError(
                    429, f"{self._count} texts wait already, and {self.max_queue} may: try again in {seconds} seconds.",
                    code="queue_full", headers={"Retry-After": str(seconds)},
                )  # fmt: skip
            for job in jobs:
                self._waiting.setdefault(job.user, deque()).append(job)
            self._count += len(jobs)
            self._changed.notify()

    def patience(self) -> int:
        """Seconds after which there may be room."""
        return max(1, min(60, round(self._pace * max(1, self._count) / max(1, self.session.slots))))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Take jobs back; what became of them is told to nobody."""
        with self._changed:
            for job in jobs:
                if job.alive:
                    job.alive = False
                    self._gone.append(job)
            self._changed.notify()

    # --- The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.no_grad():
            going = True
            while going:
                try:
                    going = self._turn()
                except Exception as error:  # whatever it was, nobody waits for ever
                    self._collapse(error)

    def _turn(self) -> bool:
        """One forward, and what belongs to it; whether there is to be another."""
        with self._changed:
            if not (self._known or self._count or self._gone or self._stop):
                self.metrics.idle()
                self._changed.wait()
            gone, self._gone = self._gone, []
        for job in gone:
            self._leave(job)
        if self._stop is not None:
            for job in [*self._known.values(), *self._all_waiting()]:
                self._fail(job, self._stop)
            self._deliver()
            return False
        self._look_at_the_clock()
        self._admit()
        for done in self.session.step() if self._known else ():
            if done.index in self._known:
                self._end(self._known.pop(done.index), done)
        self._measure()
        self._deliver()
        return True

    def _all_waiting(self) -> list[Job]:
        with self._changed:
            return [job for queue in self._waiting.values() for job in queue]

    def _admit(self) -> None:
        while self.session.free > 0:
            with self._changed:
                if not self._waiting:
                    return
                user, queue = self._waiting.popitem(last=False)
                job = queue.popleft()
                self._count -= 1
                if queue:
                    self._waiting[user] = queue  # behind all others
            if not job.alive:
                continue
            if job.watched:
                job.request.options["watchers"] = [lambda steps, job=job: self._watch(job, steps)]
            try:
                job.index = self.session.admit(job.request)
            except ValueError as error:
                self._fail(job, ApiError(400, str(error)))
                continue
            job.started = time.monotonic()
            self._known[job.index] = job

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._known.values() if job.deadline <= now]:
            self._end(job, self._leave(job), late=True)
        if self._count:
            for job in [job for job in self._all_waiting() if job.deadline <= now]:
                self._leave(job)
                late = f"No place was free within {job.deadline - job.arrived:.0f} seconds."
                again = {"Retry-After": str(self.patience())}
                self._fail(job, ApiError(503, late, code="timeout", headers=again))

    def _leave(self, job: Job) -> Done | None:
        """Take a job out, wherever it is."""
        if self._known.pop(job.index, None) is not None:
            return self.session.cancel(job.index)
        with self._changed:
            queue = self._waiting.get(job.user)
            if queue is not None and job in queue:
                queue.remove(job)
                self._count -= 1
                if not queue:
                    del self._waiting[job.user]
        return None

    def _watch(self, job: Job, steps: Sequence[Step]) -> None:
        for step in steps:
            text, tokens = "", step.settled
            if job.text is not None:
                # Where there are stop strings, the criterion has added what is settled.
                behind = step.position + len(tokens) - len(job.request.ids) - job.text.count
                if behind > 0:
                    job.text.add(tokens[len(tokens) - behind :])
                text = job.text.take()
            chances = step.chances if job.mode != "infill" else ()  # which come with the whole text
            if text or chances or job.drafts or (job.ids and tokens):
                drafts = _drafts(job, step) if job.drafts else {}
                self._news.append((job, News(text=text, tokens=tokens, chances=chances, **drafts)))

    def _end(self, job: Job, done: Done | None, late: bool = False) -> None:
        assert done is not None
        now = time.monotonic()
        if done.error is not None:
            return self._fail(job, _refused(done.error, job))
        text, filled = job.text, job.mode == "infill"
        if text is not None and not filled:
            text.add(done.tokens[text.count :])
        why: Any = "time" if late else "length"
        if filled:
            why = "time" if late else "filled"
        elif text is not None and text.stopped:
            why = "stop"
        elif done.tokens and done.tokens[-1] in job.ends:
            why = "eos"
        assert job.started is not None
        waited, stats = job.started - job.arrived, done.stats
        first = None if stats.time_to_first_token is None else waited + stats.time_to_first_token
        end = End(
            text=text.take(last=True) if text is not None and not filled else "", done=done,
            reason="length" if why in ("length", "time") else "stop", why=why, waited=waited + stats.queued,
            first=first, seconds=now - job.arrived,
        )  # fmt: skip
        self._news.append((job, end))
        self._pace = end.seconds - waited if not self._pace else 0.9 * self._pace + 0.1 * (end.seconds - waited)
        self._enter(job, done, end)
        try:
            self.finished(job, done)
        except Exception:  # whoever listens, decoding goes on
            LOG.exception("a listener failed")

    def _enter(self, job: Job, done: Done, end: End) -> None:
        """In the metrics."""
        metrics, mode, stats = self.metrics, job.mode, done.stats
        metrics.texts.labels(mode, end.why).inc()
        metrics.tokens.labels(mode).inc(stats.tokens)
        metrics.prompt_tokens.labels(mode).inc(len(job.request.ids))
        metrics.whole.labels(mode).observe(end.seconds)
        if end.first is not None:
            metrics.first.labels(mode).observe(end.first)
            if stats.tokens > 1:
                metrics.each.labels(mode).observe(max(0.0, end.seconds - end.first) / (stats.tokens - 1))
        if stats.tokens_per_forward is not None:
            metrics.gain.labels(mode).observe(stats.tokens_per_forward)
        if stats.acceptance is not None:
            metrics.accepted.labels(mode).observe(stats.acceptance)

    def _fail(self, job: Job, error: ApiError) -> None:
        self.metrics.texts.labels(job.mode, "error").inc()
        self._news.append((job, End(error=error, seconds=time.monotonic() - job.arrived)))

    def _collapse(self, error: Exception) -> None:
        LOG.exception("a forward failed; a new session goes on")
        self.metrics.failures.inc()
        for job in self._known.values():
            self._fail(job, ApiError(500, f"A forward failed ({type(error).__name__}); the server goes on."))
        self._known.clear()
        self._deliver()
        try:
            self.session = self.make()
        except Exception as again:  # there is no going on: whoever waits is told, and /health says so
            LOG.exception("there is no new session")
            self._stop = ApiError(500, f"The server failed ({type(again).__name__}): start it anew.")

    def check(self, request: Request) -> Plan:
        """Whether the session would take a request, and how it would decode it; for any thread.

        Raises:
            ValueError: it would not.
        """
        return self.session.check(request)

    def _measure(self) -> None:
        metrics, stats = self.metrics, self.session.stats
        metrics.waiting.set(self._count + self.session.waiting)
        metrics.active.set(self.session.active)
        metrics.count_tokens(self.session.tokens)
        metrics.count_forwards({"prefill": stats.prefill, "settle": stats.settle, "draft": stats.draft})

    def _deliver(self) -> None:
        """Hand over what happened, all of a step at once."""
        news, self._news = [(job, what) for job, what in self._news if job.alive], []
        by: dict[Any, list[tuple[Job, News | End]]] = {}
        for job, what in news:
            by.setdefault(job.loop, []).append((job, what))
        for loop, own in by.items():
            try:
                loop.call_soon_threadsafe(_tell, own)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for job, _ in own:
                    job.alive = False


def _drafts(job: Job, step: Step) -> dict[str, Any]:
    """What is told of a forward where drafts are asked for."""
    before, settled = job.told, len(step.settled)
    pieces = job.pieces([*(token for token, _, _ in before), *step.settled, *step.window])
    same = next((i for i, (_, piece, _) in enumerate(before) if piece != pieces[i]), len(before))
    confidence = [*(chance for _, _, chance in before), *step.confidence]
    tokens = [*(token for token, _, _ in before), *step.settled]
    job.told = list(zip(tokens, pieces, confidence, strict=False))[-(LONGEST - 1) :] if settled else before
    again = len(before) - same
    return {"step": step, "pieces": pieces[same:], "confidence": confidence[same:], "again": again}


def _tell(news: Sequence[tuple[Job, News | End]]) -> None:
    for job, what in news:
        if job.alive:
            job.tell(job, what)


def _refused(error: Exception, job: Job) -> ApiError:
    """What a request is told whose text failed."""
    if isinstance(error, LogitsError) and "not numbers" not in str(error):
        said = str(error).split(": ", 1)[1]
        return ApiError(400, f"No text fits what was asked for: {said}")
    LOG.error("a text failed: %s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, f"This text failed ({type(error).__name__}); the server goes on.")
