"""Tracing that is off costs nothing; what is on goes below the right parent, and a wrong one does no harm."""

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
assert not any(tracing.begin() for _ in range(1000))
assert tracing.start("work", "server") is None
with tracing.beginning("tick") as span, tracing.within("part", parent="00-1-2-01") as part:
    assert (span, part, tracing.traceparent()) == (None, None, None)
tracing.shutdown()
print(*[name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "google"))])
"""


@pytest.fixture
def traced() -> Iterator[None]:
    """To a collector that is not there; only what is sent knows that."""
    settings = ServiceSettings(
        _env_file=None,
        amqp_url="amqp://h/",
        otel_exporter_otlp_endpoint="http://127.0.0.1:1",
        otel_traces_sampler_arg=1,
    )
    tracing.configure(settings, "test")
    yield
    tracing.shutdown()


@pytest.mark.parametrize("module", ["gateway", "allocator", "reaper", "csp_syncer"])
def test_without_an_endpoint_nothing_is_traced_and_no_library_loaded(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OFF.format(module=module)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == []


@pytest.mark.usefixtures("traced")
def test_work_within_work_is_below_it() -> None:
    assert tracing.traceparent() is None
    with tracing.beginning("tick"):
        above = tracing.traceparent()
        assert above is not None
        with tracing.within("part"):
            below = tracing.traceparent()
        assert tracing.traceparent() == above
    assert tracing.traceparent() is None
    assert below is not None
    assert below != above
    assert below.split("-")[1] == above.split("-")[1]


@pytest.mark.usefixtures("traced")
def test_a_traceparent_from_elsewhere_goes_on() -> None:
    with tracing.within("part", parent=PARENT):
        here = tracing.traceparent()
    assert here is not None
    assert here.split("-")[1] == PARENT.split("-")[1]


@pytest.mark.usefixtures("traced")
def test_work_for_nothing_traced_is_not_traced() -> None:
    with tracing.within("part") as span:
        assert span is None


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-01", PARENT + "0", PARENT.upper(), PARENT[:-2] + "00"])
def test_a_traceparent_that_cannot_be_read_stops_nothing(parent: str) -> None:
    with tracing.within("part", parent=parent) as span:
        assert span is None
    begun = tracing.start("work", "server", links=[parent])
    assert begun is not None
    begun.end()
