"""Tracing: no cost when it is off, correct parents when it is on, and tolerance for invalid traceparents."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from sandbox_broker.observability import tracing
from sandbox_broker.runtime.settings import ServiceSettings

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

OFF = """
import sys
import {module}.main
from sandbox_broker.observability import tracing
from sandbox_broker.runtime.settings import ServiceSettings

tracing.configure(ServiceSettings(_env_file=None, amqp_url="amqp://h/"), "gateway")
assert not any(tracing.should_sample() for _ in range(1000))
assert tracing.start("work", "server") is None
with tracing.root_span("tick") as span, tracing.child_span("part", parent="00-1-2-01") as part:
    assert (span, part, tracing.traceparent()) == (None, None, None)
tracing.shutdown()
print(*[name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "google"))])
"""


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    """Trace to a collector that does not exist. Only the exporter notices that, and its end takes 3 s."""
    settings = ServiceSettings(
        _env_file=None,
        amqp_url="amqp://h/",
        otel_exporter_otlp_endpoint="http://127.0.0.1:1",
        otel_traces_sampler_arg=1,
    )
    tracing.configure(settings, "test")
    yield
    tracing.shutdown()


@pytest.mark.parametrize("module", ["gateway", "allocator", "reaper", "csp_syncer", "provisioner"])
def test_without_an_endpoint_tracing_is_off_and_the_library_is_not_loaded(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OFF.format(module=module)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == []


@pytest.mark.usefixtures("traced")
def test_a_child_span_belongs_to_the_trace_of_its_parent() -> None:
    assert tracing.traceparent() is None
    with tracing.root_span("tick"):
        above = tracing.traceparent()
        assert above is not None
        with tracing.child_span("part"):
            below = tracing.traceparent()
        assert tracing.traceparent() == above
    assert tracing.traceparent() is None
    assert below is not None
    assert below != above
    assert below.split("-")[1] == above.split("-")[1]


@pytest.mark.usefixtures("traced")
def test_a_received_traceparent_is_continued() -> None:
    with tracing.child_span("part", parent=PARENT):
        here = tracing.traceparent()
    assert here is not None
    assert here.split("-")[1] == PARENT.split("-")[1]


@pytest.mark.usefixtures("traced")
def test_work_without_a_parent_is_not_traced() -> None:
    with tracing.child_span("part") as span:
        assert span is None


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-01", PARENT + "0", PARENT.upper(), PARENT[:-2] + "00"])
def test_an_invalid_traceparent_is_ignored(parent: str) -> None:
    with tracing.child_span("part", parent=parent) as span:
        assert span is None
    begun = tracing.start("work", "server", links=[parent])
    assert begun is not None
    begun.end()
