"""The errors that a user sees, and the order to stop. Knows nothing else of the package, and no torch."""

from __future__ import annotations

import signal

#: Task, environment and number of a training episode.
EpisodePlace = tuple[int, int, int]


class UserError(ValueError):
    """A request that cannot be met. The message is one line: what was given, what is allowed, what to do.

    Commands print it and exit with code 2.
    """


def missing_extra(needs: str, extra: str) -> UserError:
    """Return the error of something that ``needs`` an optional dependency, such as ``format=onnx needs onnx``."""
    return UserError(
        f"{needs}, of the extra {extra}; in the checkout of this package run "
        f"pip install -c constraints.txt -e '.[{extra}]'"
    )


class RunFailure(RuntimeError):
    """A run that cannot go on, whatever was asked of it. The message is one line; commands exit with code 1.

    Attributes:
        details: a traceback of another process, or empty.
        episode: the training episode that failed; None where that is unknown.
    """

    def __init__(self, message: str, details: str = "", episode: EpisodePlace | None = None) -> None:
        super().__init__(message)
        self.details, self.episode = details, episode


class Terminated(BaseException):
    """SIGTERM or SIGHUP came where nothing has to be saved. Like KeyboardInterrupt it is nobody's to catch."""

    def __init__(self, signal_number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.exit_code = 128 + signal_number


def one_line(error: BaseException, most: int | None = 200) -> str:
    """Return an error's kind and message in one line, cut after so many characters; None: whole."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if most is None or len(line) <= most else f"{line[:most]}..."
