"""Composition of the configuration, and errors in one line, for every command."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from varshare_rl.config import TrainConfig, config_folder, register_schemas
from varshare_rl.config_checks import check_config
from varshare_rl.errors import RunFailure, Terminated, UserError
from varshare_rl.overrides import quote_names
from varshare_rl.registry import load_installed_plugins, load_plugins, lookup, require_plugins

#: Hydra without logs and folders of its own.
_SILENT = [{f"override hydra/{log}": "disabled"} for log in ("job_logging", "hydra_logging")]
_NO_FOLDERS = {"hydra": {"output_subdir": None, "run": {"dir": "."}}}


def run_command(name: str, main: Callable[[DictConfig], None], schema: type | None = None) -> None:
    """Compose the configuration of a command with the command line and call ``main`` with it.

    It is ``configs/<name>.yaml``, or the ``schema`` alone. User errors are one line on stderr and exit code 2.
    """
    composing = True
    given: list[str] = []

    def job(composed: DictConfig) -> None:
        nonlocal composing
        composing = False
        with errors_in_one_line():  # inside the job, or Hydra adds lines of its own
            _put_plugins(composed, given)
            main(composed)

    with errors_in_one_line():
        given = take_plugins()
        sys.argv[1:] = prepare(name, sys.argv[1:], schema)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them
        try:
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)(job)()
        except ValueError as error:
            if not composing or isinstance(error, UserError):
                raise
            raise _group_error(error) from error


def compose(command: str, overrides: Sequence[str], plugins: Sequence[str] = ()) -> Any:
    """The checked configuration of a command (``train``, ``continual``) as its command line would make it.

    Raises:
        UserError: what the user got wrong, in the words of the command line.
    """
    load_installed_plugins()
    given, overrides = split_plugins(overrides)
    given = list(dict.fromkeys([*plugins, *given]))
    load_plugins(given)
    overrides = prepare(command, overrides)
    theirs = GlobalHydra.instance()  # of a job that calls this; Hydra itself would put a copy in its place
    ours = copy(theirs)
    ours.clear()
    GlobalHydra.set_instance(ours)
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = hydra.compose(command, overrides=overrides)
        _put_plugins(composed, given)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except UserError:
        raise
    except ValueError as error:
        raise _group_error(error) from error
    finally:
        GlobalHydra.set_instance(theirs)
    if getattr(config, "resume", None) is None:
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


def _put_plugins(composed: DictConfig, given: Sequence[str]) -> None:
    """Have a configuration that is stored name the plugins that it was made with."""
    if "plugins" in composed:
        require_plugins(list(composed.plugins), "this configuration")
        composed.plugins = list(dict.fromkeys([*composed.plugins, *given]))


def _group_error(error: ValueError) -> UserError:
    """Hydra's word for a group chosen by what is not a name, such as ``env=true``."""
    return UserError(f"{error}; a group such as env or gradient takes a name")


def new_run_dir(run_dir: str | None, parts: Sequence[str]) -> Path:
    """The folder of a new run: ``run_dir``, or a name made of the choices in ``parts``; jobs of a sweep share one.

    Raises:
        UserError: ``run_dir`` is empty.
    """
    if run_dir is not None:
        if not run_dir:
            raise UserError("run_dir is empty; give a folder, or leave it out for runs/<name>")
        return Path(run_dir)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        job = HydraConfig.get()
        choices = re.sub(r"[^\w.+-]+", "_", job.job.override_dirname.replace("=", "-"))  # no = in resume=<folder>
        if len(choices) > 150:  # file systems end names at 255 bytes
            choices = f"{job.job.num}_{choices[:150]}"
        return Path(job.sweep.dir) / (choices.strip("_") or str(job.job.num))
    return Path("runs") / f"{'_'.join(parts)}_{time.strftime('%Y%m%d-%H%M%S')}"


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what the user got wrong into :func:`fail`, and an interrupt into a word.

    SIGTERM raises :class:`Terminated`, so that what was begun is cleared up.
    """
    try:
        with _terminable():
            yield
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error))
    except (RunFailure, OSError) as failure:
        fail(str(failure), code=1)
    except (MemoryError, OverflowError, RecursionError) as error:
        fail(_too_large(error))
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        fail(_too_large(error))
    except KeyboardInterrupt:  # training itself catches the first one and saves
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Terminated:
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone can have handlers
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


#: Beginnings of the lines in Hydra's messages that tell a user nothing.
_TECHNICAL = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Set the environment")


#: Hydra's word for a file, such as a recipe, whose options are of another choice than the command line's.
_FOREIGN = re.compile(r"In '(?P<file>[^']+)': .*\bKey '(?P<key>\w+)' not in '(?P<config>\w+)'", re.DOTALL)


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
    return " ".join(dict.fromkeys(kept))
