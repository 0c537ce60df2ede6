"""The errors people see, each with its exit status."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked: one line that names the option, the value and what would work."""

    status = 2


class CheckpointError(UserError):
    """A file that cannot be used, and why."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient stopped being a number."""

    status = 3


class CannotSave(RuntimeError):
    """A checkpoint could not be written."""

    status = 74


class RunHeld(RuntimeError):
    """Another process works on the same run."""

    status = 75


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved. Not an Exception, so that nothing swallows it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}; issue the same command to continue")
        self.signum = signum
        self.status = 128 + signum


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
