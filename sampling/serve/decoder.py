"""The one thread that owns the session: jobs go in, news come out, and whoever is gone frees a place at the next step.

Requests wait here and not in the session, so that those of different users take turns.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from hybrid.sampling.options.checks import LogitsError
from hybrid.sampling.request import Done
from hybrid.sampling.serve.jobs import End, Job
from hybrid.sampling.serve.metrics import Metrics
from hybrid.sampling.serve.protocol import ApiError
from hybrid.sampling.session import Session

LOG = logging.getLogger("hybrid.serve")


class Decoder:
    """Decodes jobs in a thread of its own.

    Attributes:
        session: the thread's own: what it is doing is nobody else's to look at.
        active: texts that were being decoded after the last step.
    """

    def __init__(
        self, make: Callable[[], Session], metrics: Metrics, *, max_queue: int,
        finished: Callable[[Job, Done], object] = lambda job, done: None,
    ) -> None:  # fmt: skip
        """`make`: a session. `finished`: is told of each text that was decoded to its end, in the thread."""
        self.make, self.metrics, self.max_queue, self.finished = make, metrics, max_queue, finished
        self.session, self.active = make(), 0
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._turn = 0  # of whoever got a place last
        self._stop: ApiError | None = None
        self._known: dict[int, Job] = {}
        self._pace = 0.0  # seconds of a text, of late
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        metrics.slots.set(self.session.slots)

    # --- For any thread ---------------------------------------------------------------------------

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
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Texts that wait or are being decoded."""
        return self.waiting + len(self._known)

    @property
    def patience(self) -> str:
        """Seconds after which there may be room."""
        return f"{max(1, min(60, self._pace * max(1, self.waiting) / max(1, self.session.slots))):.0f}"

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn: all of them, or none.

        Raises:
            ApiError: there is no room for so many, or the server is about to end.
        """
        with self._changed:
            if self._stop is not None:
                raise self._stop.with_traceback(None)
            free = max(0, self.session.slots - len(self._known))
            if self.waiting + len(jobs) > self.max_queue + free:
                full, when = f"{self.waiting} texts wait already, and {self.max_queue} may", self.patience
                said = f"{full}: try again in {when} seconds."
                raise ApiError(429, said, code="queue_full", headers={"Retry-After": when})
            for job in jobs:
                # The first text of a user that waits here is of the next turn, the second of the one after that.
                own = (other.turn for other in self._waiting if other.user == job.user)
                job.turn = 1 + max(own, default=self._turn)
                self._waiting.append(job)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Take jobs back; what became of them is told to nobody."""
        with self._changed:
            for job in jobs:
                job.alive = False
            self._changed.notify()

    # --- The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.no_grad():
            going = True
            while going:
                try:
                    going = self._step()
                except Exception as error:  # whatever it was, nobody waits for ever
                    self._collapse(error)

    def _step(self) -> bool:
        """One forward, and what belongs to it; whether there is to be another."""
        with self._changed:
            if not (self._known or self._waiting or self._stop):
                self.metrics.idle()
                self._changed.wait()
            now = time.monotonic()
            jobs = [*self._known.values(), *self._waiting]
            late = [job for job in self._waiting if job.alive and job.deadline <= now]
            self._waiting = [job for job in self._waiting if job.alive and job.deadline > now]
        if self._stop is not None:
            for job in jobs:
                self._fail(job, self._stop)
            return False
        for job in late:
            said = f"No place was free within {job.deadline - job.arrived:.0f} seconds."
            self._fail(job, ApiError(503, said, code="timeout", headers={"Retry-After": self.patience}))
        for job in list(self._known.values()):
            if not job.alive or job.deadline <= now:
                del self._known[job.index]
                done = self.session.cancel(job.index)
                if job.alive:
                    self._end(job, done, late=True)
        self._admit()
        ended = self.session.step() if self._known else []
        self.active = self.session.active
        self.metrics.look(self.session, self.waiting)
        for done in ended:
            if done.index in self._known:
                self._end(self._known.pop(done.index), done)
        return True

    def _admit(self) -> None:
        while self.session.free > 0:
            with self._changed:
                if not self.waiting:
                    return
                job = min(self._waiting, key=lambda job: job.turn)  # of one turn, who came first
                self._waiting.remove(job)
                self._turn = job.turn
            if job.alive:
                try:
                    job.index, job.started = self.session.admit(job.request), time.monotonic()
                    self._known[job.index] = job
                except Exception as error:
                    self._fail(job, ApiError(400, str(error)) if isinstance(error, ValueError) else _refused(error))

    def _end(self, job: Job, done: Done, late: bool = False) -> None:
        if done.error is not None:
            return self._fail(job, _refused(done.error))
        end = job.end(done, late)
        seconds = end.seconds - (job.started - job.arrived)
        self._pace = 0.9 * self._pace + 0.1 * seconds if self._pace else seconds
        self.metrics.ended(job, end)
        try:
            self.finished(job, done)
        except Exception:  # whoever listens, decoding goes on
            LOG.exception("a listener failed")
        job.tell(job, end)

    def _fail(self, job: Job, error: ApiError) -> None:
        self.metrics.texts.labels(job.mode, "error").inc()
        job.tell(job, End(error=error, seconds=time.monotonic() - job.arrived))

    def _collapse(self, error: Exception) -> None:
        LOG.exception("a forward failed; a new session goes on")
        self.metrics.failures.inc()
        for job in self._known.values():
            self._fail(job, ApiError(500, f"A forward failed ({type(error).__name__}); the server goes on."))
        self._known.clear()
        try:
            self.session = self.make()
        except Exception as again:  # there is no going on: whoever waits is told, and /health says so
            LOG.exception("there is no new session")
            self._stop = ApiError(500, f"The server failed ({type(again).__name__}): start it anew.")


def _refused(error: Exception) -> ApiError:
    """What a request is told whose text failed."""
    if isinstance(error, LogitsError) and "not numbers" not in str(error):
        return ApiError(400, f"No text fits what was asked for: {str(error).split(': ', 1)[1]}")
    LOG.error("a text failed: %s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, f"This text failed ({type(error).__name__}); the server goes on.")
