"""What is wrong with a model or a text, worded for the command that was given it."""

from __future__ import annotations

from awq_pycuda.errors import InputError
from awq_pycuda.options import refusal


class Fault(Exception):
    """A fault of the option ``key``: ``what`` is wrong with its value, ``allowed`` what would be right.

    ``allowed`` None leaves that to the option's own rule, ``value`` None names the value that was given.
    """

    def __init__(self, key: str, what: str, allowed: str | None = None, value: str | None = None) -> None:
        super().__init__(what)
        self.key = key
        self.what = what
        self.allowed = allowed
        self.value = value

    def worded(self, options: object) -> InputError:
        """The fault as the one line of a command with these options, whose class says what its keys allow."""
        value = getattr(options, self.key) if self.value is None else self.value
        if self.allowed is None:
            return refusal(type(options), self.key, value, self.what)
        return InputError(f"{self.key}={value}: {self.what}; allowed: {self.allowed}")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
