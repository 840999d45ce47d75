"""Start of a trace: a span for each enqueued request, and the `traceparent` that travels with it.

Off (the default), nothing of OpenTelemetry is imported. On, nothing here raises: a request is worth more than its
trace. The standard OTEL_ variables say where spans go and how many; OpenTelemetry itself reads them.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from l4queue.models import RequestSpec

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

    from l4queue.config import Settings

__all__ = ("EnqueueTraces", "Exporting", "context_of", "explain_failure")

log = logging.getLogger("l4queue.tracing")
_CLIENT = "l4queue-client"
_EXIT_S = 2.0  # what the end of a process may wait for its last spans to leave


class EnqueueTraces:
    """The spans of one client. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._is_on = settings.traces
        self._namespace = settings.namespace
        self._tracer: Tracer | None = None

    def begin(self, spec: RequestSpec) -> tuple[str | None, Span | None]:
        """The `traceparent` that the request carries, and the span to `end` once it is accepted.

        The span's parent is the `traceparent` that the request came with, else the span that is current here.
        """
        if not self._is_on:
            return spec.traceparent, None
        try:
            span = self._start(spec)
        except Exception as error:  # whatever an OTEL_ variable or an application's processor may bring about
            self._is_on = False
            log.warning("no traces from this client: %s", explain_failure(error))
            return spec.traceparent, None
        context = span.get_span_context()
        if not context.trace_flags.sampled:
            return spec.traceparent, None
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}", span

    def end(self, span: Span, *, request_id: str, is_new: bool) -> None:
        """The request was accepted now, or was known (`is_new` false: by its idempotency key)."""
        try:
            span.set_attribute("l4queue.request_id", request_id)
            if not is_new:
                span.set_attribute("l4queue.known_already", True)
            span.end()
        except Exception as error:  # an application's own processor: the request is accepted all the same
            log.warning("no span of request %s: %s", request_id, explain_failure(error))

    def _start(self, spec: RequestSpec) -> Span:
        from opentelemetry.trace import SpanKind

        if self._tracer is None:
            self._tracer = _tracer()
        most = spec.params.max_tokens
        return self._tracer.start_span(
            "enqueue",
            context=None if spec.traceparent is None else context_of(spec.traceparent),
            kind=SpanKind.PRODUCER,
            attributes={
                "messaging.system": "l4queue",
                "messaging.destination.name": self._namespace,
                "l4queue.priority": spec.priority,
                **({} if most is None else {"gen_ai.request.max_tokens": most}),
            },
        )


def explain_failure(error: Exception) -> str:
    """Why there are no traces, and what to do."""
    if isinstance(error, ImportError):
        return "OpenTelemetry is not installed: pip install 'l4queue[otel]'"
    return f"{type(error).__name__}: {error}"


def context_of(traceparent: str) -> Context:
    """The context of a remote parent."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


class Exporting:
    """Spans on their way out: by OTLP over HTTP, in batches, from a thread of OpenTelemetry's own.

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before `service` and `instance`. Raises ImportError where
    OpenTelemetry is not installed, and whatever it raises at OTEL_ variables that it does not understand.
    """

    def __init__(self, service: str, *, instance: str = "") -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = {"service.name": service, "service.version": version("l4queue")}
        if instance:
            ours["service.instance.id"] = instance
        resource = Resource.create().merge(Resource(ours)).merge(OTELResourceDetector().detect())
        self._exporter = _HastyExporter()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", self._exporter)))

    @property
    def tracer(self) -> Tracer:
        """Makes the spans."""
        return self._provider.get_tracer("l4queue", version("l4queue"))

    def close(self) -> None:
        """Send what is left, within about two seconds; safe to call twice.

        Longer only if a collector takes a connection and does not answer: OTEL_EXPORTER_OTLP_TIMEOUT.
        """
        self._exporter.hurry()
        self._provider.shutdown()


class _HastyExporter:
    """A SpanExporter over OpenTelemetry's that can be told to hurry, since its own try on as a process ends."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self._usual = OTLPSpanExporter()
        self._end_s: float | None = None

    def hurry(self) -> None:
        """No more patience: what is not out within `_EXIT_S` is lost."""
        if self._end_s is None:
            self._end_s = time.monotonic() + _EXIT_S
            self._usual.shutdown()  # type: ignore[no-untyped-call]  # theirs. It waits no longer between two tries

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """As SpanExporter.export."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import SpanExportResult

        if self._end_s is None:
            return self._usual.export(spans)
        left_s = self._end_s - time.monotonic()
        return OTLPSpanExporter(timeout=left_s).export(spans) if left_s > 0 else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """As SpanExporter.shutdown."""
        self.hurry()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """As SpanExporter.force_flush: nothing is held here."""
        return True


@cache
def _own() -> Exporting:
    """One for all clients of this process."""
    own = Exporting(_CLIENT)
    atexit.register(own.close)
    return own


def _tracer() -> Tracer:
    """Of the application where it has set up OpenTelemetry, else of our own."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import get_tracer_provider

    application = get_tracer_provider()
    if isinstance(application, TracerProvider):
        return application.get_tracer("l4queue", version("l4queue"))
    return _own().tracer
