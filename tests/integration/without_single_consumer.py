"""Runs a service with RabbitMQ's single active consumer switched off: `python without_single_consumer.py MODULE`.

It stands in for what RabbitMQ can do by itself when it promotes a standby while the old consumer still works.
"""

import dataclasses
import runpy
import sys

from sandbox_broker import topology


def switched_off(queue: topology.Queue) -> topology.Queue:
    arguments = {name: value for name, value in queue.arguments.items() if name != "x-single-active-consumer"}
    return topology.Queue(queue.name, arguments)


changed = switched_off(topology.ALLOCATOR_COMMANDS)
topology.BINDINGS = tuple(
    dataclasses.replace(binding, queue=changed) if binding.queue == topology.ALLOCATOR_COMMANDS else binding
    for binding in topology.BINDINGS
)
topology.QUEUES = tuple(changed if queue == topology.ALLOCATOR_COMMANDS else queue for queue in topology.QUEUES)
topology.ALLOCATOR_COMMANDS = changed

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
