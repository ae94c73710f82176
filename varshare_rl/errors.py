"""The errors that a user sees, and the order to stop. Knows nothing else of the package, and no torch."""


class UserError(ValueError):
    """A request that cannot be met. The message is one line: what was given, what is allowed, what to do.

    Commands print it and exit with code 2.
    """


class RunFailure(RuntimeError):
    """A run that cannot go on, whatever was asked of it. The message is one line; commands exit with code 1.

    Attributes:
        details: a traceback of another process, or empty.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Terminated(BaseException):
    """SIGTERM came where nothing has to be saved. Like KeyboardInterrupt it is no error, and nobody's to catch."""
