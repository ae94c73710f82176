"""Composition of the configuration, and errors in one line, for every command."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NoReturn, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from varshare_rl.branch import compose_branch, source_of
from varshare_rl.command_line import check_composed, parse, read_words, whole_numbers
from varshare_rl.config import AUTO, GROUPS, TrainConfig, config_folder, register_schemas
from varshare_rl.config_checks import check_config
from varshare_rl.errors import RunFailure, Terminated, UserError
from varshare_rl.overrides import quote_names
from varshare_rl.ranks import speaks
from varshare_rl.registry import load_installed_plugins, load_plugins, lookup, require_plugins
from varshare_rl.run.signals import Handlers, handling

#: Hydra without logs and folders of its own.
_SILENT = [{f"override hydra/{log}": "disabled"} for log in ("job_logging", "hydra_logging")]
_NO_FOLDERS = {"hydra": {"output_subdir": None, "run": {"dir": "."}}}


@dataclass(frozen=True)
class CommandLine:
    """A command line as it was given: its command, overrides, plugins, and whether it is a sweep."""

    command: str
    overrides: list[str]
    plugins: list[str]
    multirun: bool = False


def run_command(name: str, main: Callable[[DictConfig], None], schema: type) -> None:
    """Compose the configuration of a command from its ``schema`` and the command line, and call ``main`` with it.

    User errors are one line on stderr and exit code 2.
    """
    with errors_in_one_line():
        line = read_command_line(name, schema)
        if line is None:
            return
        if line.multirun:
            raise UserError(
                f"-m sweeps over runs of train and continual, and {name.replace('_', ' ')} has none; "
                "leave it out, and call the command once for each"
            )
        main(compose_config(line)[0])


def read_command_line(name: str, schema: type | None = None) -> CommandLine | None:
    """Read ``sys.argv``, and make known to Hydra what the command is composed of.

    It is ``configs/<name>.yaml``, or the ``schema`` alone. None after a flag has shown something instead.

    Raises:
        UserError: a flag is unknown, a plugin is missing, or it fails.
    """
    plugins = take_plugins()
    words = read_words(sys.argv[1:])
    line = CommandLine(name, prepare(name, words.overrides, schema), plugins, words.multirun)
    if not words.showing:
        return line
    composed, overrides = compose_config(line)
    if name == "train" and composed.pretrained is not None:
        raise UserError(
            f"{words.showing[0]} shows what is composed here, and options of from={composed.pretrained} are in its "
            "config.yaml; leave out one of them"
        )
    sys.argv[1:] = [*words.showing, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)(lambda config: None)()
    return None


def compose_config(line: CommandLine) -> tuple[DictConfig, list[str]]:
    """Compose the configuration of a command; also returns its overrides, with 1e6 for an integer as 1000000.

    Raises:
        UserError: what the user got wrong, in the words of the command line.
    """
    with own_hydra():
        parsed = parse(line.overrides, GROUPS)
        source = source_of(parsed) if line.command == "train" else None
        if source is None:
            composed, overrides = _compose_files(line)
        else:
            overrides = [whole_numbers(item) for item in line.overrides]
            composed = compose_branch(source, parse(overrides))
        check_composed(composed, parsed)
    put_plugins(composed, line.plugins)
    return composed, overrides


def _compose_files(line: CommandLine) -> tuple[DictConfig, list[str]]:
    """Compose the files of ``configs`` with the command line, as :func:`compose_config`."""
    overrides = list(line.overrides)
    while True:
        try:
            return hydra.compose(line.command, overrides=overrides), overrides
        except HydraException as error:
            index = _refused_as_integer(error, overrides)
            if index is None or whole_numbers(overrides[index]) == overrides[index]:
                raise
            overrides[index] = whole_numbers(overrides[index])


def _refused_as_integer(error: HydraException, overrides: Sequence[str]) -> int | None:
    """The position of the override whose value was refused because it is no integer."""
    cause = error.__cause__
    if cause is None or "could not be converted to Integer" not in str(cause):
        return None
    lines = (f"Error merging override {item}" for item in overrides)
    return next((index for index, line in enumerate(lines) if str(error).startswith(line)), None)


@contextmanager
def own_hydra() -> Iterator[Any]:
    """Give Hydra's composer, and put back the one of a job around it; Hydra itself would put a copy there.

    Raises:
        UserError: Hydra's errors, in one line.
    """
    theirs = GlobalHydra.instance()
    ours = copy(theirs)
    ours.clear()
    GlobalHydra.set_instance(ours)
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            yield GlobalHydra.instance().hydra
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except UserError:
        raise
    except ValueError as error:  # a group chosen by what is not a name, such as env=true
        raise UserError(f"{error}; a group such as env or gradient takes a name") from error
    finally:
        GlobalHydra.set_instance(theirs)


def compose(command: str, overrides: Sequence[str], plugins: Sequence[str] = ()) -> Any:
    """The checked configuration of a command (``train``, ``continual``) as its command line would make it.

    Raises:
        UserError: what the user got wrong, in the words of the command line.
    """
    load_installed_plugins()
    given, overrides = split_plugins(overrides)
    given = list(dict.fromkeys([*plugins, *given]))
    load_plugins(given)
    composed, _ = compose_config(CommandLine(command, prepare(command, overrides), given))
    return typed(composed)


def typed(composed: DictConfig) -> Any:
    """The configuration of a run as its class, checked unless the run goes on with that of its folder.

    Raises:
        UserError: names the option, its value, and what is allowed.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    if getattr(config, "resume", None) in (None, AUTO):
        check_config(cast(TrainConfig, config))
    return config


def prepare(command: str, overrides: Sequence[str], schema: type | None = None) -> list[str]:
    """Make what a command is composed of known to Hydra; returns the overrides with options in their Python names.

    A command with a ``schema`` of its own has nothing to choose and no file in ``configs``.
    """
    names = [item.partition("=") for item in overrides]
    overrides = [name + equals + quote_names(value) for name, equals, value in names]
    if schema is not None:
        store = ConfigStore.instance()
        store.store(name=f"{command}_schema", node=schema)
        store.store(name=command, node={"defaults": [f"{command}_schema", "_self_", *_SILENT], **_NO_FOLDERS})
        return overrides
    register_schemas(command)
    aliases = lookup("command", command).aliases
    names = [item.partition("=") for item in overrides]
    return [aliases.get(name, name) + equals + value for name, equals, value in names]


def take_plugins() -> list[str]:
    """Import the plugins of installed packages and of the command line, and take the latter out of it.

    Raises:
        UserError: one is missing, or fails.
    """
    load_installed_plugins()
    names, sys.argv[1:] = split_plugins(sys.argv[1:])
    load_plugins(names)
    return names


def split_plugins(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules named by ``plugins=[...]``, and all other overrides.

    Raises:
        UserError: it is not a list of names.
    """
    names: list[str] = []
    others: list[str] = []
    for item in overrides:
        key, _, value = item.partition("=")
        if key != "plugins":
            others.append(item)
            continue
        found = [name.strip() for name in value.removeprefix("[").removesuffix("]").split(",") if name.strip()]
        if not all(part.isidentifier() for name in found for part in name.split(".")):
            raise UserError(f"plugins is {value}; give a list of modules: plugins=[my_package]")
        names += found
    return names, others


def put_plugins(composed: DictConfig, given: Sequence[str]) -> None:
    """Have a configuration that is stored name the plugins that it was made with."""
    if "plugins" in composed:
        require_plugins(list(composed.plugins), "this configuration")
        composed.plugins = list(dict.fromkeys([*composed.plugins, *given]))


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what the user got wrong into :func:`fail`, and an interrupt into a word.

    SIGTERM and SIGHUP raise :class:`Terminated`, so that what was begun is cleared up.
    """
    try:
        with terminable():
            yield
    except Exception as error:
        known = in_one_line(error)
        if known is None:
            raise
        if not speaks(error):
            raise SystemExit(known[1]) from None
        fail(*known)
    except (KeyboardInterrupt, Terminated) as stop:  # training itself catches the first one and saves
        if speaks():
            print("stopped", file=sys.stderr)
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.exit_code
        raise SystemExit(code) from None


def in_one_line(error: Exception) -> tuple[str, int] | None:
    """Return what to say of an error, and its exit code; None for one of ours, which keeps its traceback."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain(error), 2
    if isinstance(error, RunFailure | OSError):
        return str(error), 2 if getattr(error, "errno", None) == errno.ENAMETOOLONG else 1
    too_large = isinstance(error, MemoryError | OverflowError | RecursionError)
    if too_large or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return _too_large(error), 2
    return None


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated`, as does SIGHUP unless it is ignored (``nohup``)."""
    if threading.current_thread() is not threading.main_thread():  # which alone can have handlers
        yield
        return

    def end(number: int, before: Handlers) -> NoReturn:
        raise Terminated(number)

    with handling((signal.SIGTERM, signal.SIGHUP), end):
        yield


#: Characters of an error's line; of more the middle is left out.
LONGEST_LINE = 1200

#: Words of torch's allocators.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed|"
    r"numel: integer multiplication overflow|Overflow when unpacking|invalid size, try using"
)


def _too_large(error: BaseException) -> str:
    """Say that something is too large for this machine, in the words of what has failed."""
    words = " ".join(str(error).split())[:160] or type(error).__name__
    return (
        f"this machine cannot hold what was asked for ({words}); give smaller sizes: network.hidden, network.rank, "
        "env.envs_per_task, batches, replay or rollouts"
    )


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line and end with a code: 2 for what the user got wrong."""
    line = re.sub(r"\s*\n\s*", " ", message.strip())  # other spaces may be those of a folder's name
    if len(line) > LONGEST_LINE:  # of a value without end; what is allowed comes last
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 3 :]}"
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


#: Beginnings of the lines in Hydra's messages that tell a user nothing.
_TECHNICAL = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Set the environment")


#: Hydra's word for a file, such as a recipe, whose options are of another choice than the command line's.
_FOREIGN = re.compile(r"In '(?P<file>[^']+)': .*\bKey '(?P<key>\w+)' not in '(?P<config>\w+)'", re.DOTALL)


#: Hydra's words for a value of the wrong kind.
_REFUSED = re.compile(
    r"Error merging override (?P<given>.+?) (?:"
    r"Value '.*' of type '\w+' could not be converted to (?P<kind>\w+)"
    r"|Value '.*' is not a valid (?P<bool>bool)"
    r"|(?:field '[^']*' is not Optional|Invalid type assigned: NoneType is not a subclass)(?P<null>)"
    r"|Invalid value assigned: \w+ is not a (?P<list>ListConfig), list or tuple\."
    r"|Invalid value '.*', expected one of \[(?P<words>.*)\])",
    re.DOTALL,
)
_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def _allowed(refused: re.Match[str]) -> str:
    """What is allowed where Hydra refused a value."""
    if refused["null"] is not None:
        return "it must have a value"
    if refused["list"]:
        return "it takes a list, [a,b]"
    if refused["words"]:
        return f"it must be one of {refused['words']}"
    kind = "Boolean" if refused["bool"] else refused["kind"]
    return f"it must be {_KINDS.get(kind, kind)}"


def _explain(error: Exception) -> str:
    """Hydra's message without its technical lines; a refused value is explained by the innermost error."""
    foreign = _FOREIGN.match(str(error))
    if foreign:
        return (
            f"{foreign['file']} sets {foreign['key']}, which {foreign['config']} does not have: its options are "
            "for another choice; leave out the one or the other"
        )
    lines: list[str] = []
    cause: BaseException | None = error
    while isinstance(cause, HydraException | OmegaConfBaseException):
        text = str(cause).partition("Config search path:")[0]
        lines += [line.strip() for line in text.splitlines()]
        config = getattr(cause, "object_type", None)
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and is_dataclass(config):
            lines.append(f"(its options are {', '.join(option.name for option in fields(config))})")
        cause = cause.__cause__
    kept = [line for line in lines if line and not line.startswith(_TECHNICAL) and not line.endswith("_schema")]
    explained = " ".join(dict.fromkeys(kept))
    refused = _REFUSED.match(explained)
    return explained if refused is None else f"{refused['given']} is not possible: {_allowed(refused)}"
