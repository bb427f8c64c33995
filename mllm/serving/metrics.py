"""Keeps counts and times of a server, in the form that Prometheus reads.

Knows names of metrics. Does not know requests or models.
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Holds the metrics of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("mllm_requests", "Requests that were answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "mllm_request_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "mllm_first_token_seconds",
            "From a prepared request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram("mllm_batch_rows", "Answers written together.", buckets=ROWS, registry=registry)
        self.batch_seconds = Counter("mllm_batch_seconds", "Time in which the model wrote.", registry=registry)
        self.prompt_tokens = Counter("mllm_prompt_tokens", "Tokens of prompts, soft ones included.", registry=registry)
        self.new_tokens = Counter("mllm_new_tokens", "Tokens of answers.", registry=registry)
        self.soft_tokens = Counter("mllm_soft_tokens", "Soft tokens of media.", ["medium"], registry=registry)
        self.encoded = Counter(
            "mllm_encoded_media", "Media that went through an encoder.", ["medium"], registry=registry
        )

    def watch(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Add values that are looked up when they are read: a description and a function by name."""
        for name, (description, value) in gauges.items():
            Gauge(name, description, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Write all metrics as Prometheus reads them."""
        return generate_latest(self._registry)
