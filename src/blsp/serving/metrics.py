"""Counters and histograms of the server, for Prometheus (GET /metrics).

In:  requests, tokens, seconds. Out: text in the format of Prometheus, by its own client library.
Try: `curl localhost:8000/metrics`
Flow: app.py (requests), scheduler.py (work of the model) → **metrics.py** → GET /metrics
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server, so that several servers can run in one process."""

    def __init__(self) -> None:
        self.registry = here = CollectorRegistry()
        self.requests = Counter("blsp_requests", "Requests by route and status", ["route", "status"], registry=here)
        self.first_token = Histogram(
            "blsp_first_token_seconds", "From submission to the first token", buckets=SECONDS, registry=here
        )
        self.total = Histogram("blsp_answer_seconds", "From submission to the end", buckets=SECONDS, registry=here)
        self.tokens = Counter("blsp_generated_tokens", "Tokens written", registry=here)
        self.speech = Counter("blsp_speech_seconds", "Seconds of speech heard", registry=here)
        self.steps = Counter("blsp_decode_steps", "Steps of the decode loop", registry=here)
        self.waiting = Gauge("blsp_requests_waiting", "Requests in the queue", registry=here)
        self.running = Gauge("blsp_requests_running", "Requests being written", registry=here)
