"""The runs of a sweep: their options, short names and folders, all checked before the first one starts."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from varshare_rl.cli import CommandLine, compose_config, own_hydra, typed
from varshare_rl.command_line import parse
from varshare_rl.config import GROUPS, RESUMABLE, flat_options, made_otherwise
from varshare_rl.errors import UserError
from varshare_rl.overrides import literal
from varshare_rl.run_files import CONFIG_FILE
from varshare_rl.sweeps.command import RunCommand

#: Options that say how to run, not what: the name of a sweep's folder does not depend on them.
_INCIDENTAL = tuple(option for option in RESUMABLE if option != "total_transitions")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: what sets it apart, such as ``kl_weight-0.1_seed-0``.
        choices: values of the options that are swept, as they were written.
        overrides: that the run is started with.
        folder: its run folder.
    """

    name: str
    choices: dict[str, str]
    overrides: list[str]
    folder: Path


@dataclass
class Sweep:
    """What a command line asks for.

    Attributes:
        folder: of the sweep.
        fixed: overrides of all runs.
        swept: values of the options that are swept, as they were written.
        searched: ranges to search in, which only a search has.
        hydra: overrides that say how runs are started.
        overwrite: start all of them anew.
    """

    folder: Path
    fixed: list[str]
    swept: dict[str, list[str]]
    searched: dict[str, Override]
    hydra: list[str]
    overwrite: bool
    short: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [*self.swept, *self.searched]
        last = [re.split(r"[./]", key)[-1] for key in keys]
        self.short = {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}

    def job(self, choices: dict[str, str], *further: str) -> Job:
        """Return the run with these values; its name begins with them, and has ``further`` parts."""
        others = {key: value for key, value in choices.items() if key != "run_dir"}
        parts = [f"{self.short[key].replace('/', '.')}-{_plain(value)}" for key, value in others.items()]
        name = _file_name([*parts, *further]) or "run"
        folder = Path(choices["run_dir"].strip("'\"")) if "run_dir" in choices else self.folder / name
        own = [f"run_dir={literal(str(folder))}", "overwrite=true" if self.overwrite else "resume=auto"]
        values = [f"{key}={value}" for key, value in others.items()]
        return Job(name, choices, [*self.fixed, *values, *own], folder)

    def grid(self) -> list[Job]:
        """Return the runs of all combinations.

        Raises:
            UserError: two of them are the same, or would have the same folder.
        """
        combinations = [
            dict(zip(self.swept, values, strict=True)) for values in itertools.product(*self.swept.values())
        ]
        jobs = [self.job(choices) for choices in combinations]
        names = [job.name for job in jobs]
        jobs = [job if names.count(job.name) == 1 else self.job(job.choices, _digest(job.choices)) for job in jobs]
        folders = [job.folder.absolute() for job in jobs]
        twice = next((job for job, folder in zip(jobs, folders, strict=True) if folders.count(folder) > 1), None)
        if twice is not None:
            raise UserError(f"two runs of this sweep would have the folder {twice.folder}; give every value once")
        return jobs


def read_sweep(line: CommandLine) -> Sweep:
    """Part a command line into what is fixed, swept and searched.

    Raises:
        UserError: an option cannot be that of a sweep.
    """
    fixed, hydra, searched, overwrite = [], [], {}, False
    swept: dict[str, list[str]] = {}
    folder = None
    with own_hydra() as composer:
        parsed = parse(line.overrides, GROUPS, composer.config_loader)
        for item, override in zip(line.overrides, parsed, strict=True):
            key = override.get_key_element()
            if key == "hydra.sweep.dir":
                folder = Path(str(override.value()))
            elif key.startswith(("hydra.", "hydra/")):
                hydra.append(item)
            elif key == "overwrite" and isinstance(override.value(), bool):
                overwrite = bool(override.value())
            elif key == "resume":
                if override.value() != "auto":
                    raise UserError(f"{item} is for one run; a sweep goes on when its command is given again")
            elif not override.is_sweep_override():
                if key == "run_dir":
                    swept[key] = [override.get_value_element_as_str()]
                else:
                    fixed.append(item)
            elif override.is_discrete_sweep():
                swept[key] = list(override.sweep_string_iterator())
            else:
                searched[key] = override
    combinations = math.prod(len(values) for values in swept.values())
    if len(swept.get("run_dir", ())) == 1 and (combinations > 1 or searched):
        raise UserError(
            f"run_dir={swept['run_dir'][0]} is the folder of one run, and this sweep has more; give "
            "hydra.sweep.dir=<folder> for the folder that all of them are in"
        )
    keys = [*swept, *searched]
    sweep = Sweep(Path(), fixed, swept, searched, hydra, overwrite)
    what = [item.partition("=")[2] for item in fixed if item.startswith(("env=", "+experiment="))]
    rest = sorted(item for item in fixed if not item.startswith(_INCIDENTAL))
    ranges = [override.input_line for override in searched.values()]
    lists = [item for item in swept.items() if item[0] != "seed"] if "hydra/sweeper=optuna" in hydra else []
    digest = _digest((line.command, line.plugins, rest, sorted(keys), ranges, lists))
    name = _file_name(["sweep", *what, *(sweep.short[key].replace("/", ".") for key in keys)])
    return replace(sweep, folder=Path("runs") / f"{name}_{digest}" if folder is None else folder)


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked, whether it has been begun, whether it is done, and what is then not as asked."""

    job: Job
    composed: DictConfig
    overrides: list[str]
    begun: bool
    done: bool
    otherwise: str


def check_jobs(command: RunCommand, line: CommandLine, jobs: Sequence[Job], overwrite: bool) -> list[Prepared]:
    """Compose and build the configuration of every run, and look how far it is.

    Raises:
        UserError: one of them is impossible, or its folder holds another run.
    """
    built: dict[str, Any] = {}
    checked = []
    for job in jobs:
        try:
            composed, overrides = compose_config(replace(line, overrides=job.overrides))
            config = replace(typed(composed), resume=None, overwrite=False)
            key = repr({**flat_options(config), "seed": 0, "run_dir": ""})
            if key not in built:
                built[key] = command.as_built(config)
            config = replace(built[key], seed=config.seed, run_dir=config.run_dir)
            begun = not overwrite and (job.folder / CONFIG_FILE).exists()
            done = begun and command.is_done(job.folder, config)
            otherwise = made_otherwise(config, command.config_of(job.folder)) if done else ""
        except UserError as error:
            raise UserError(f"{error}" if len(jobs) == 1 else f"run {job.name}: {error}") from error
        checked.append(Prepared(job, composed, overrides, begun, done, otherwise))
    return checked


def _plain(text: str) -> str:
    """Return a text with what file systems or shells may not take as underscores."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _file_name(parts: Sequence[str]) -> str:
    """Return a name of at most 120 letters that begins with the parts."""
    name = _plain("_".join(parts))
    return name if len(name) <= 120 else f"{name[:112]}_{_digest(parts)}"


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:6]
