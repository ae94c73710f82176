"""Start of every command, and their help: the docstrings of their files, read without importing torch."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO, cast

from varshare_rl.compiler import put_off_compiler

#: The file of every command; its function ``command`` reads ``sys.argv``.
COMMANDS: Mapping[str, str] = {
    "train": "varshare_rl.commands.train",
    "continual": "varshare_rl.continual.command",
    "evaluate": "varshare_rl.commands.evaluate",
    "report": "varshare_rl.commands.report",
    "export": "varshare_rl.commands.export",
    "prune": "varshare_rl.commands.prune",
    "calibrate": "varshare_rl.commands.calibrate",
    "share": "varshare_rl.commands.share",
    "runs": "varshare_rl.commands.runs",
}
#: Commands whose first word names what they do; they have a help for each.
WITH_WORDS = ("report", "share", "runs")


class LastingStream:
    """A text stream that is never in the way: what cannot be written, in its encoding or at all, is dropped.

    A reader that has left (``| head -1``) or a full disk behind ``>`` must not end a training run.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Let all that is written from now on, and what the buffers hold, go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def start(name: str) -> None:
    """Run a command on ``sys.argv``, or print its help."""
    sys.stdout, sys.stderr = (cast(TextIO, LastingStream(stream)) for stream in (sys.stdout, sys.stderr))
    arguments = sys.argv[1:]
    if name != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        if os.environ["LOCAL_RANK"] == "0":
            print(
                f"error: {name} runs in one process, and torchrun is for train; python -m varshare_rl.{name}",
                file=sys.stderr,
            )
        raise SystemExit(2)
    asks_for_word = name in WITH_WORDS and bool(arguments) and not arguments[0].startswith("-")
    if wants_help(arguments) and not asks_for_word:
        print(help_text(COMMANDS[name]))
    else:
        put_off_compiler()
        try:
            import_module(COMMANDS[name]).command()
        except KeyboardInterrupt:  # while it is imported; commands answer for themselves
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None


def wants_help(arguments: Sequence[str]) -> bool:
    """Return True if help is asked for, rather than Hydra's own ``--hydra-help``."""
    return "--help" in arguments or "-h" in arguments


def help_text(module: str) -> str:
    """Return the docstring of a module without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def overview() -> str:
    """Return a line for every command."""
    lines = [f"  {name:<10} {help_text(module).splitlines()[0]}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "varshare <command> ..., or python -m varshare_rl.<command> ...",
            "",
            *lines,
            "",
            "varshare <command> --help says more.",
        ]
    )


def main() -> None:
    """Run the command that the first argument names; without one, list them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(overview())
    elif name not in COMMANDS:
        print(f"error: unknown command {name[:100]!r}; there is {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        start(name)
