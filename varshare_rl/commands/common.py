"""Steps of several commands: reading their options, and episodes of a trained agent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from varshare_rl.assemble import TrainedAgent
from varshare_rl.envs.suite import VectorEngine
from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds

Options = TypeVar("Options")

#: Options that must be given, with an example.
NEEDS_RUN: Mapping[str, str] = {"run": "runs/<folder>"}


def read_options(composed: DictConfig, kind: type[Options], needed: Mapping[str, str] = NEEDS_RUN) -> Options:
    """Return what a command was given, checked.

    Raises:
        UserError: names an option that is missing, or one outside its bounds.
    """
    for name, example in needed.items():
        if OmegaConf.is_missing(composed, name):
            raise UserError(f"{name} is missing; give {name}={example}")
    options = cast(Options, OmegaConf.to_object(composed))
    check_bounds(options)
    return options


class ReportConfig(ABC):
    """Options of a report, in a file whose docstring is its help."""

    #: Options that must be given, with an example.
    needed: ClassVar[Mapping[str, str]] = NEEDS_RUN
    #: True if folders among the arguments are what the report is about.
    takes_folders: ClassVar[bool] = False

    @abstractmethod
    def build(self, folders: Sequence[str]) -> None:
        """Write the report; ``folders`` are empty unless it takes them."""


@contextmanager
def evaluation_engine(agent: TrainedAgent, episodes: int, seed: int) -> Iterator[VectorEngine]:
    """Give an engine for so many evaluation episodes of every task, and free it in the end."""
    envs = min(episodes, agent.config.env.envs_per_task)
    engine = agent.suite.make_engine(envs, seed, evaluation=True)
    try:
        yield engine
    finally:
        engine.close()


def evaluation_seed(agent: TrainedAgent, seed: int | None) -> int:
    """Return the seed of the episodes' starts: the run's own unless one is given."""
    own: int = agent.config.seed
    return own if seed is None else seed


def output_folder(given: str | Path | None, default: Path) -> Path:
    """Return the folder that a command writes to: the one given, or its own choice."""
    return default if given is None else Path(given)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}); give another out") from error
