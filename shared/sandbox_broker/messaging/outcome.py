"""Outcome of a command at its sender: the reply, or the error that takes its place."""

from sandbox_broker.contract.commands import Command, R
from sandbox_broker.contract.replies import Parameters, RefusalCode, Refused, Reply


class CommandNotDone(Exception):
    """The service refused the command or did not reply."""


class CommandRefused(CommandNotDone):
    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal

    @property
    def code(self) -> RefusalCode:
        return self.refusal.code

    @property
    def parameters(self) -> Parameters:
        return self.refusal.parameters or {}


class ServiceUnavailable(CommandNotDone):
    """RabbitMQ or the service is down. The service may still carry out the command if it was sent before."""


class NoReply(CommandNotDone):
    """The reply did not arrive in time. The service may still carry out the command."""


class UnexpectedReply(CommandNotDone):
    """The reply cannot be decoded, or it does not belong to the command."""


def read_reply(command: Command[R], reply: Reply) -> R:
    """Return the reply. Raises CommandRefused or UnexpectedReply."""
    if isinstance(reply, command.reply_type):
        return reply
    if isinstance(reply, Refused):
        raise CommandRefused(reply)
    raise UnexpectedReply(f"{reply.type} is no reply to {command.type}")
