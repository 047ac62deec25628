"""Sets OpenTelemetry up for a process, and names the attributes that our spans carry."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

from shared import __version__
from shared.settings import tracing_endpoint_is_set

INSTANCE_ID = "pdserve.instance.id"
REQUEST_ID = "pdserve.request.id"
GROUP = "pdserve.group"
NUM_PROMPT_TOKENS = "pdserve.num_prompt_tokens"
NUM_CACHED_TOKENS = "pdserve.num_cached_tokens"
NUM_OUTPUT_TOKENS = "pdserve.num_output_tokens"
NUM_BLOCKS = "pdserve.num_blocks"
KV_BYTES = "pdserve.kv_bytes"
REJECTIONS = "pdserve.num_rejections"

tracer = trace.get_tracer("pdserve", __version__)
"""Spans of all services come from here; without `exporting` they are no-ops."""


@contextmanager
def untraced() -> Iterator[None]:
    """What is asked of others meanwhile is in a trace that nobody samples."""
    context = trace.SpanContext(secrets.randbits(127) + 1, secrets.randbits(63) + 1, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        yield


@contextmanager
def exporting(service: str, service_id: str) -> Iterator[None]:
    """Exports this process's spans by OTLP over HTTP while the block lasts, if the environment asks for it."""
    if not tracing_endpoint_is_set():
        yield
        return
    # The SDK costs memory and start-up time, so only those who want traces import it.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": f"pdserve-{service}", "service.instance.id": service_id, "service.version": __version__}
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()
