"""Settings of the RabbitMQ nodes: the tests use those of the Kubernetes component."""

import yaml

from devstack.rabbitmq_cluster import RabbitMQCluster
from tests.integration.stack import ROOT

COMPONENT = ROOT / "deploy" / "k8s" / "components" / "rabbitmq-operator" / "cluster.yaml"
SHARED = {"cluster_partition_handling", "net_ticktime"}


def read_settings(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def test_the_nodes_of_the_tests_have_the_settings_of_the_component() -> None:
    resources = yaml.safe_load_all(COMPONENT.read_text())
    (cluster,) = (resource for resource in resources if resource["kind"] == "RabbitmqCluster")
    deployed = read_settings(cluster["spec"]["rabbitmq"]["additionalConfig"].splitlines())
    node = RabbitMQCluster().nodes[0]
    tested = read_settings(list(node.configuration))

    assert {name: deployed[name] for name in SHARED} == {name: tested[name] for name in SHARED}
    assert cluster["spec"]["rabbitmq"]["advancedConfig"].strip() == node.advanced_configuration.strip()
