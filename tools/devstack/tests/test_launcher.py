from collections.abc import Callable

from devstack.main import Launcher
from devstack.output import Terminal
from devstack.settings import Settings

pytest_plugins = ("devstack.fixtures",)


def test_the_gateway_ignores_the_ops_port_for_containers(
    settings_from: Callable[..., Settings],
) -> None:
    settings = settings_from(OPS_PORT="9100", BROKER_ADMIN_TOKEN="of-administrators")
    launcher = Launcher(settings, "postgresql://x/y", "amqp://x/", Terminal())

    assert launcher._environment()["OPS_PORT"] == ""
