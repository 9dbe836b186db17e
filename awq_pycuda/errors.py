"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Bad input, found before any work.

    The message is the single line that the user sees: it names the key, the value and what is allowed,
    in the form ``key=value: what is wrong; what is allowed``. The commands print it and exit with code 2.
    """


class RunFailed(RuntimeError):
    """A run that could not finish. `interrupted`: because the user stopped it."""

    def __init__(self, reason: str, interrupted: bool = False) -> None:
        super().__init__(reason)
        self.interrupted = interrupted
