"""Traces by OpenTelemetry. Off unless the standard OTEL_* variables name an endpoint; off costs nothing."""
