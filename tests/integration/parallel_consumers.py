"""Run a service without RabbitMQ's single active consumer: `python parallel_consumers.py MODULE`.

RabbitMQ can deliver to two consumers by itself, when it promotes a standby consumer while the old one still works.
"""

import dataclasses
import runpy
import sys

from sandbox_broker.contract import topology


def without_single_active_consumer(queue: topology.Queue) -> topology.Queue:
    arguments = {name: value for name, value in queue.arguments.items() if name != "x-single-active-consumer"}
    return dataclasses.replace(queue, arguments=arguments)


commands = without_single_active_consumer(topology.ALLOCATOR_COMMANDS)
topology.BINDINGS = tuple(
    dataclasses.replace(binding, queue=commands) if binding.queue == topology.ALLOCATOR_COMMANDS else binding
    for binding in topology.BINDINGS
)
topology.QUEUES = tuple(commands if queue == topology.ALLOCATOR_COMMANDS else queue for queue in topology.QUEUES)
topology.ALLOCATOR_COMMANDS = commands

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
