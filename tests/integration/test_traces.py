"""Traces from HTTP over RabbitMQ to PostgreSQL and CSP, as a collector receives them."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.testing import NewDatabase, NewVhost
from tests.integration.otlp_collector import Collector, Span, run_collector
from tests.integration.stack import (
    ADMIN,
    ADMIN_TOKEN,
    CSP_TOKEN,
    TRACK_TOKEN,
    Stack,
    run_stack,
    track_headers,
)

SERVER, CLIENT, CONSUMER = 2, 3, 5
"""Span kinds of OTLP."""


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with run_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
async def traced_stack(
    new_database: NewDatabase, new_vhost: NewVhost, collector: Collector
) -> AsyncIterator[Stack]:
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_TRACES_SAMPLER_ARG": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",  # ms
    }
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=settings) as stack,
    ):
        yield stack


@pytest.fixture
async def stack(traced_stack: Stack) -> Stack:
    await traced_stack.fill(100)
    return traced_stack


async def wait_for_spans(collector: Collector, request_id: str, *names: str) -> dict[str, Span]:
    """Wait until the spans `names` of a request have arrived. Returns all its spans by name."""

    async def have_all_arrived() -> bool:
        return set(names) <= {span.name for span in collector.find_request(request_id)}

    await wait_until(have_all_arrived)
    return {span.name: span for span in collector.find_request(request_id)}


async def test_an_allocation_is_one_trace_from_http_to_the_commit(stack: Stack, collector: Collector) -> None:
    response = await stack.allocate("ada")
    spans = await wait_for_spans(
        collector,
        response.headers["X-Request-ID"],
        "POST /v1/allocate",
        "process AllocateSandbox",
        "commit AllocateSandbox",
    )
    request, process, commit = (
        spans[name] for name in ("POST /v1/allocate", "process AllocateSandbox", "commit AllocateSandbox")
    )
    assert [span.service for span in (request, process, commit)] == ["gateway", "allocator", "allocator"]
    assert [span.kind for span in (request, process, commit)] == [SERVER, CONSUMER, CLIENT]
    assert [span.parent_id for span in (request, process, commit)] == ["", request.span_id, process.span_id]
    assert request.attributes["http.response.status_code"] == 201
    assert request.attributes["broker.sandbox_id"] == response.json()["sandbox_id"]
    assert process.attributes["messaging.destination.name"] == "allocator.commands"
    assert commit.attributes["db.system.name"] == "postgresql"
    assert commit.attributes["broker.epoch"] > 0


async def test_a_release_is_one_trace_to_the_deletion_in_csp(stack: Stack, collector: Collector) -> None:
    lease = (await stack.allocate("ada")).json()
    released = await stack.release(lease["sandbox_id"], "ada")
    spans = await wait_for_spans(
        collector,
        released.headers["X-Request-ID"],
        "process ReleaseSandbox",
        "commit ReleaseSandbox",
        "delete sandbox",
        "CSP delete_account",
        "process RecordDeletion",
        "commit RecordDeletion",
    )
    (request,) = (span for span in spans.values() if span.kind == SERVER)
    deletion = spans["delete sandbox"]
    assert (deletion.service, deletion.parent_id) == ("reaper", request.span_id)
    call = spans["CSP delete_account"]
    assert (call.kind, call.parent_id) == (CLIENT, deletion.span_id)
    assert call.attributes["http.response.status_code"] == 204
    assert spans["process RecordDeletion"].parent_id == deletion.span_id
    assert spans["commit RecordDeletion"].parent_id == spans["process RecordDeletion"].span_id


async def test_a_sync_is_one_trace_with_csp_listing_and_commit(stack: Stack, collector: Collector) -> None:
    response = await stack.client.post(f"{stack.url}/v1/admin/sync", headers=ADMIN)
    spans = await wait_for_spans(
        collector,
        response.headers["X-Request-ID"],
        "process SyncPool",
        "CSP list_accounts",
        "process ApplyListing",
        "commit ApplyListing",
    )
    listing = spans["CSP list_accounts"]
    assert (listing.service, listing.parent_id) == ("csp-syncer", spans["process SyncPool"].span_id)
    assert spans["process ApplyListing"].parent_id == spans["process SyncPool"].span_id


async def test_requests_of_one_batch_are_linked(stack: Stack, collector: Collector) -> None:
    number = 0

    async def has_links() -> bool:
        nonlocal number
        number += 1
        await asyncio.gather(*(stack.allocate(f"student-{number % 2}-{index}") for index in range(40)))
        linked = [span for span in collector.spans if span.name == "process AllocateSandbox" and span.links]
        known = {span.trace_id for span in collector.spans}
        return any(set(span.links) <= known - {span.trace_id} for span in linked)

    await wait_until(has_links)
    batched = [span for span in collector.spans if span.name == "process AllocateSandbox" and span.links]
    assert all(span.attributes["messaging.batch.message_count"] > 1 for span in batched)


async def test_a_failure_is_recorded_in_its_span(stack: Stack, collector: Collector) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_listings": 1})
    response = await stack.client.post(f"{stack.url}/v1/admin/sync", headers=ADMIN)
    assert response.status_code == 502
    spans = await wait_for_spans(
        collector, response.headers["X-Request-ID"], "CSP list_accounts", "process SyncPool"
    )
    assert spans["CSP list_accounts"].attributes["http.response.status_code"] == 500
    (request,) = (span for span in spans.values() if span.kind == SERVER)
    assert request.failed
    assert request.attributes["error.type"] == "CSP_UNAVAILABLE"


async def test_a_traceparent_of_a_client_is_ignored(stack: Stack, collector: Collector) -> None:
    sent = "4bf92f3577b34da6a3ce929d0e0e4736"
    response = await stack.client.post(
        f"{stack.url}/v1/allocate",
        headers={**track_headers("ada"), "traceparent": f"00-{sent}-00f067aa0ba902b7-01"},
    )
    await wait_for_spans(collector, response.headers["X-Request-ID"], "POST /v1/allocate")
    assert collector.find_trace(sent) == []


async def test_no_span_contains_a_token(collector: Collector) -> None:
    exported = b"".join(collector.raw)
    for secret in (TRACK_TOKEN, ADMIN_TOKEN, CSP_TOKEN):
        assert secret.encode() not in exported


async def test_the_broker_works_without_its_collector(new_database: NewDatabase, new_vhost: NewVhost) -> None:
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_TRACES_SAMPLER_ARG": "1",
    }
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=settings) as stack,
    ):
        await stack.fill(3)
        lease = (await stack.allocate("ada")).json()
        assert (await stack.release(lease["sandbox_id"], "ada")).status_code == 200
        await wait_until(stack.nothing_pending)
        for process in [stack.processes[name] for name in ("gateway", "reaper", "csp_syncer", "allocator")]:
            assert await process.stop(25, with_signal=signal.SIGTERM) == 0
