"""Prometheus metrics, with vLLM's names after our prefix, so that its dashboards and autoscalers need no more."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...kernels.dispatch import FALLBACKS
from ..accounting import dense_memory, weight_memory
from ..outputs import Delta, Output

if TYPE_CHECKING:
    from ..async_embedder import AsyncEmbedder, EncoderRun
    from ..async_engine import Answers, AsyncEngine
    from ..engine import EngineStats
    from ..model import Decoder

PREFIX = "pared:"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
TIMES = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of an answer.",
    "request_time_per_output_token_seconds": "Mean time of an answer's tokens after the first.",
    "e2e_request_latency_seconds": "From a request's arrival to the end of an answer.",
    "request_queue_time_seconds": "From a request's arrival until it runs.",
    "request_prefill_time_seconds": "From when a request runs to its first token.",
    "request_decode_time_seconds": "From an answer's first token to its end.",
    "embedding_seconds": "From a request's arrival to its vectors.",
    "embedding_queue_seconds": "From a request's arrival until its texts run.",
    "embedding_inference_seconds": "Of one call of the encoder, which takes what waits.",
}
COUNTS = {
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer.",
    "embedding_tokens": "Tokens of a text that was embedded.",
    "embedding_batch_texts": "Texts of one call of the encoder.",
    "embedding_batch_tokens": "Tokens of one call of the encoder.",
    "iteration_tokens_total": "Token rows of an engine step.",
}


class Metrics:
    """Everything that /metrics shows, about one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._times = {name: self._histogram(name, text, SECONDS) for name, text in TIMES.items()}
        self._counts = {name: self._histogram(name, text, TOKENS) for name, text in COUNTS.items()}
        self._done = Counter(
            f"{PREFIX}request_success", "Answers by how they ended.", ["finished_reason"], registry=self.registry
        )
        self._rejected = Counter(
            f"{PREFIX}admission_rejections", "Requests that were not taken.", ["reason"], registry=self.registry
        )
        self._computed = 0
        self.registry.register(_OfKernels())

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}{name}", text, registry=self.registry, buckets=buckets)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def show_engine(self, engine: AsyncEngine) -> None:
        """Have the engine's own counts among the metrics."""
        self.registry.register(_OfEngine(engine))

    def show_embedder(self, embedder: AsyncEmbedder) -> None:
        """Have the texts that wait for their vectors among the metrics."""
        self._gauge("num_texts_waiting", "Texts that wait for their vectors.", lambda: embedder.waiting)

    def show_weights(self, decoder: Decoder) -> None:
        """Have the model's memory among the metrics."""
        held, dense = weight_memory(decoder), dense_memory(decoder)
        self._gauge("weights_bytes", "Bytes of the model's weights in memory.", lambda: held)
        self._gauge("weights_dense_bytes", "Bytes of the same weights when dense.", lambda: dense)

    def show_ffns(self, parts: Sequence[AsyncEngine | AsyncEmbedder]) -> None:
        """Have what routed FFNs did among the metrics. parts: what runs the one model."""
        self.registry.register(_OfFfns(parts))

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"{PREFIX}{name}", text, registry=self.registry).set_function(read)

    def embedded(self, tokens: Sequence[int], seconds: float) -> None:
        """Note a request for vectors: the tokens of each text, and how long it took."""
        self._times["embedding_seconds"].observe(seconds)
        for count in tokens:
            self._counts["embedding_tokens"].observe(count)

    def encoded(self, run: EncoderRun) -> None:
        """Note a call of the encoder."""
        for waited in run.waited:
            self._times["embedding_queue_seconds"].observe(waited)
        self._times["embedding_inference_seconds"].observe(run.seconds)
        self._counts["embedding_batch_texts"].observe(run.texts)
        self._counts["embedding_batch_tokens"].observe(run.tokens)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def step(self, stats: EngineStats) -> None:
        """Note a step of the engine, with its totals after it."""
        if stats.computed_tokens > self._computed:
            self._counts["iteration_tokens_total"].observe(stats.computed_tokens - self._computed)
            self._computed = stats.computed_tokens

    async def watch(
        self, answers: Answers, outputs: list[Output], line: dict[str, Any], arrived: float
    ) -> AsyncIterator[tuple[int, Delta]]:
        """The deltas of a request, unchanged, while its times are taken. `line`: the request's line in the log.
        arrived: when the request did, by time.monotonic; its prompt has been read into tokens since.
        """
        clocks = {(p, c.index): _Clock(arrived) for p, output in enumerate(outputs) for c in output.choices}
        line.update(prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs), finish=[])
        line.update(output_tokens=0, cached_tokens=0)
        async for place, delta in answers:
            self._note(clocks[place, delta.index], delta)
            line.setdefault("first_token_seconds", round(time.monotonic() - arrived, 4))
            line["output_tokens"] += len(delta.token_ids)
            if delta.finish_reason is not None:
                line["finish"].append(delta.finish_reason)
                line["cached_tokens"] += delta.cached_tokens if delta.index == 0 else 0
                self._counts["request_prompt_tokens"].observe(len(outputs[place].prompt_token_ids))
            yield place, delta

    def _note(self, clock: _Clock, delta: Delta) -> None:
        now, times = time.monotonic(), self._times
        if clock.first is None:
            clock.first, started = now, delta.started or now
            times["time_to_first_token_seconds"].observe(now - clock.arrived)
            times["request_queue_time_seconds"].observe(max(0.0, started - clock.arrived))
            times["request_prefill_time_seconds"].observe(now - started)
        elif delta.token_ids:
            times["inter_token_latency_seconds"].observe(now - clock.last)
        clock.last = now
        clock.tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            times["e2e_request_latency_seconds"].observe(now - clock.arrived)
            times["request_decode_time_seconds"].observe(now - clock.first)
            if clock.tokens > 1:
                each = (now - clock.first) / (clock.tokens - 1)
                times["request_time_per_output_token_seconds"].observe(each)
            self._counts["request_generation_tokens"].observe(clock.tokens)
            self._done.labels(delta.finish_reason).inc()


class _Clock:
    """The times of one answer, by time.monotonic."""

    def __init__(self, arrived: float) -> None:
        self.arrived = self.last = arrived
        self.first: float | None = None
        self.tokens = 0


class _OfEngine:
    """Reads the engine's counts when they are asked for."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        gauges = {
            "num_requests_running": ("Sequences that run.", stats.running),
            "num_requests_waiting": ("Sequences that wait for a place.", stats.waiting),
            "kv_cache_usage_perc": (
                "Share of KV blocks in use, 1 is all.",
                stats.kv_blocks_used / stats.kv_blocks_total,
            ),
        }
        counters = {
            "num_preemptions": ("Sequences that gave their KV blocks back.", stats.preemptions),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens that were generated.", stats.output_tokens),
            "prefix_cache_queries": ("Tokens of prompts that were looked for among known ones.", stats.prompt_tokens),
            "prefix_cache_hits": ("Tokens of prompts that were known.", stats.cached_tokens),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(PREFIX + name, text, value=value)


class _OfFfns:
    """Reads what the layers' routers decided, for every row by itself. Layers without one are left out."""

    def __init__(self, parts: Sequence[AsyncEngine | AsyncEmbedder]) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        asked = CounterMetricFamily(f"{PREFIX}ffn_groups", "Groups of FFN neurons, once a row.", labels=["layer"])
        slept = CounterMetricFamily(f"{PREFIX}ffn_groups_asleep", "Those of them that slept.", labels=["layer"])
        for layer, uses in enumerate(zip(*(part.ffn_use for part in self._parts), strict=True)):
            use = max((use for use in uses if use is not None), key=lambda use: use.rows, default=None)
            if use is not None:  # of two that share a model, who has looked last
                asked.add_metric([str(layer)], use.groups * use.rows)
                slept.add_metric([str(layer)], use.groups * use.rows - use.woken)
        if asked.samples:
            yield from (asked, slept)


class _OfKernels:
    """Reads what kernels counted when it is asked for."""

    def collect(self) -> Iterator[Metric]:
        fallbacks = CounterMetricFamily(f"{PREFIX}kernel_fallback", "Slower paths taken.", labels=["op", "reason"])
        for labels, count in list(FALLBACKS.items()):
            fallbacks.add_metric(labels, count)
        yield fallbacks
