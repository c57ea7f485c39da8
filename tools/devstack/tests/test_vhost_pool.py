"""Virtual hosts for tests, on a real RabbitMQ."""

from devstack import rabbitmq
from devstack.infrastructure import Server
from devstack.vhost_pool import VhostPool


async def test_a_group_is_deleted_when_all_its_vhosts_have_been_used(servers: tuple[Server, Server]) -> None:
    _, server = servers
    pool = VhostPool(server, "broker_test", group_size=2)
    async with pool.use_vhost() as first:
        async with pool.use_vhost() as second:
            assert first != second
            assert [await rabbitmq.unavailable_reason(url) for url in (first, second)] == [None, None]
        assert await rabbitmq.unavailable_reason(first) is None, "it was deleted while it was in use"
    for url in (first, second):
        assert await rabbitmq.unavailable_reason(url) is not None, "it still exists"


async def test_the_end_deletes_a_group_with_an_unused_vhost(servers: tuple[Server, Server]) -> None:
    _, server = servers
    pool = VhostPool(server, "broker_test", group_size=2)
    async with pool.use_vhost() as url:
        assert await rabbitmq.unavailable_reason(url) is None
    await pool.close()
    assert await rabbitmq.unavailable_reason(url) is not None, "it still exists"
