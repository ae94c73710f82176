"""The error that a user sees. Knows nothing else of the package, and no torch."""


class UserError(ValueError):
    """A request that cannot be met. The message is one line: what was given, what is allowed, what to do.

    Commands print it and exit with code 2.
    """
