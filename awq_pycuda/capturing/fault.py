"""What is wrong with an input of the capture, for the command to word."""


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


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
