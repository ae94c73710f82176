"""What the commands have in common: composing the configuration, and errors in one line."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from varshare_rl.errors import UserError


def config_folder() -> Path:
    """Where the YAML files are: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"the configs folder is missing beside {package}; install the package again")


def run_command(name: str, main: Callable[[DictConfig], None], aliases: Mapping[str, str] | None = None) -> None:
    """Compose ``configs/<name>.yaml`` with the command line and call ``main`` with it.

    What the user got wrong is one line on stderr and exit code 2. ``aliases`` are further names of options, which
    Python would not allow as names.
    """
    for alias, option in (aliases or {}).items():
        sys.argv[1:] = [re.sub(rf"^{alias}=", f"{option}=", item) for item in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them

    composing = True

    def job(composed: DictConfig) -> None:
        nonlocal composing
        composing = False
        with errors_in_one_line():  # inside the job, or Hydra adds lines of its own
            main(composed)

    with errors_in_one_line():
        try:
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)(job)()
        except ValueError as error:  # Hydra's word for a group chosen by what is not a name, such as env=true
            if not composing:
                raise
            raise UserError(f"{error}; a group such as env or gradient takes a name") from error


def new_run_dir(run_dir: str | None, parts: Sequence[str]) -> Path:
    """The folder of a new run: ``run_dir``, or a name made of the choices in ``parts``; jobs of a sweep share one.

    Raises:
        UserError: there is a run in it.
    """
    if run_dir is not None:
        if not run_dir:
            raise UserError("run_dir is empty; give a folder, or leave it out for runs/<name>")
        path = Path(run_dir)
    elif HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        job = HydraConfig.get()
        choices = re.sub(r"[^\w.+-]+", "_", job.job.override_dirname.replace("=", "-"))  # no = in resume=<folder>
        if len(choices) > 150:  # file systems end names at 255 bytes
            choices = f"{job.job.num}_{choices[:150]}"
        path = Path(job.sweep.dir) / (choices.strip("_") or str(job.job.num))
    else:
        path = Path("runs") / f"{'_'.join(parts)}_{time.strftime('%Y%m%d-%H%M%S')}"
    if (path / "metrics.jsonl").exists() or (path / "config.yaml").exists():
        raise UserError(f"{path} holds a run already; go on with resume={path}, or give another run_dir")
    return path


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what the user got wrong into :func:`fail`, and an interrupt into a word."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error))
    except KeyboardInterrupt:  # training itself catches the first one and saves
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def fail(message: str) -> NoReturn:
    """Print one line and end with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


#: Beginnings of the lines in Hydra's messages that tell a user nothing.
_TECHNICAL = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Set the environment")


def _explain(error: Exception) -> str:
    """Hydra's message without its technical lines; a refused value is explained by the innermost error."""
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
