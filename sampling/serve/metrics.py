"""What Prometheus reads at /metrics."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hybrid.sampling.serve.jobs import End, Job
from hybrid.sampling.session import Session

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAINS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16, 32)
SPAN = 5.0  # seconds that the speed goes over


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"hybrid_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"hybrid_{name}", about, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"hybrid_{name}", about, ("mode",), buckets=buckets, registry=registry)

        self.requests = counter("requests", "Answers by endpoint and status.", "endpoint", "status")
        self.texts = counter("texts", "Texts that ended, by mode and by what ended them.", "mode", "ended")
        self.tokens = counter("generated_tokens", "New tokens.", "mode")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "mode")
        self.forwards = counter("forwards", "Batched forwards by what they did.", "kind")
        self.failures = counter("session_failures", "Forwards that failed as a whole.")
        self.waiting = gauge("queue", "Texts that wait for a place.")
        self.active = gauge("active_rows", "Texts that are being decoded.")
        self.slots = gauge("slots", "Texts that are decoded at once, at most.")
        self.speed = gauge("tokens_per_second", f"New tokens a second, over the last {SPAN:.0f} seconds.")
        self.first = histogram("time_to_first_token_seconds", "From the request to its first new token.", SECONDS)
        self.each = histogram("time_per_token_seconds", "From the first new token to the last, a token.", TOKEN_SECONDS)
        self.whole = histogram("request_seconds", "From the request to the end of a text.", SECONDS)
        self.gain = histogram("tokens_per_forward", "New tokens per forward after the prompt, of a text.", GAINS)
        self.accepted = histogram("acceptance", "Tokens gained in a speculative round, of a text.", GAINS)
        self._seen: deque[tuple[float, int]] = deque()
        self._counted = {"prefill": 0, "settle": 0, "draft": 0}

    def ended(self, job: Job, end: End) -> None:
        """A text was decoded to its end."""
        assert end.done is not None
        mode, stats = job.mode, end.done.stats
        self.texts.labels(mode, end.why).inc()
        self.tokens.labels(mode).inc(stats.tokens)
        self.prompt_tokens.labels(mode).inc(len(job.request.ids))
        each = None
        if end.first is not None and stats.tokens > 1:
            each = max(0.0, end.seconds - end.first) / (stats.tokens - 1)
        for histogram, value in (
            (self.whole, end.seconds), (self.first, end.first), (self.each, each),
            (self.gain, stats.tokens_per_forward), (self.accepted, stats.acceptance),
        ):  # fmt: skip
            if value is not None:
                histogram.labels(mode).observe(value)

    def look(self, session: Session, waiting: int) -> None:
        """After a step of a session, the same one or one that began anew; `waiting`: texts outside it."""
        self.waiting.set(waiting + session.waiting)
        self.active.set(session.active)
        for kind, before in self._counted.items():
            count = getattr(session.stats, kind)
            self.forwards.labels(kind).inc(count - before if count >= before else count)
            self._counted[kind] = count
        now, tokens = time.monotonic(), session.tokens
        if self._seen and tokens < self._seen[-1][1]:  # another session
            self._seen.clear()
        self._seen.append((now, tokens))
        while len(self._seen) > 2 and self._seen[1][0] < now - SPAN:
            self._seen.popleft()
        begin, before = self._seen[0]
        self.speed.set((tokens - before) / (now - begin) if now > begin else 0.0)

    def idle(self) -> None:
        """Nothing is decoded."""
        self._seen.clear()
        self.speed.set(0.0)

    def page(self) -> bytes:
        return generate_latest(self.registry)
