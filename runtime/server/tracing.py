"""OpenTelemetry: a span for each request, with the attributes of its semantic conventions and never a text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ...errors import BadParameter

OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
NAMES = {
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "first_token_seconds": "gen_ai.server.time_to_first_token",
    "request_id": "pared.request_id",
}
"""What a request's line in the log says -> what its span calls it."""


class Spans:
    """Sends spans to a collector, in batches and beside the server's threads.

    endpoint: where it takes OTLP over HTTP, as http://localhost:4318/v1/traces. Raises BadParameter without the extra.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise BadParameter(f"traces need {error.name}: pip install 'pared[otel]'") from error
        self.model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "pared"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("pared")

    def tell(self, headers: Mapping[str, str], line: Mapping[str, Any]) -> None:
        """A request that is over. headers: its own, whose traceparent names the client's span. line: as in the log."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ended = time.time_ns()
        operation = OPERATIONS.get(line["path"])
        attributes = {NAMES[name]: value for name, value in line.items() if name in NAMES}
        if operation is not None:
            attributes |= {"gen_ai.operation.name": operation, "gen_ai.request.model": self.model}
        span = self._tracer.start_span(
            f"{operation} {self.model}" if operation else f"{line['method']} {line['path']}",
            TraceContextTextMapPropagator().extract(dict(headers)),
            SpanKind.SERVER,
            attributes,
            start_time=ended - int(line["seconds"] * 1e9),
        )
        if line["status"] >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
