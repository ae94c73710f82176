"""Tasks of a sequence: those that are learnt, and those of the agent that it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from varshare_rl.assemble import TrainedAgent, build_suite
from varshare_rl.continual.config import ContinualConfig, one_task, with_task_list
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.reporting.continual_measures import original_name


@dataclass(frozen=True)
class SequenceTask:
    """One task of a sequence.

    Attributes:
        name: unique in the sequence.
        suite, index: the suite that it is evaluated in, and its index there.
        env: options of its environment alone; None for a task that was learnt before the sequence.
        alone: the suite of that.
    """

    name: str
    suite: Suite
    index: int
    env: Any = None
    alone: Suite | None = None


def new_tasks(config: ContinualConfig) -> list[SequenceTask]:
    """Return the tasks that are learnt, in order, as many times as they come round.

    Raises:
        UserError: the environment is no list of tasks, or they differ in their spaces.
    """
    env = with_task_list(config.env, build_suite(config))
    whole = build_suite(replace(config, env=env))
    found = []
    for index, name in enumerate(whole.task_names):
        own = one_task(env, whole, index)
        alone = build_suite(replace(config, env=own))
        for space, mine, common in differing_spaces(alone, whole):
            raise UserError(
                f"{space} of {name} is {mine}, of others {common}; tasks of a sequence must agree in it"
            )
        found.append(SequenceTask(name, whole, index, own, alone))
    return named_apart([], found * config.repeats)


def pretrained_tasks(agent: TrainedAgent | None) -> list[SequenceTask]:
    """Return the tasks of the agent that a sequence goes on from."""
    if agent is None:
        return []
    return [SequenceTask(name, agent.suite, index) for index, name in enumerate(agent.suite.task_names)]


def named_apart(old: Sequence[SequenceTask], new: Sequence[SequenceTask]) -> list[SequenceTask]:
    """Return the new tasks, with a name ``<task> (2)`` for one that was learnt before and comes round again."""
    taken = {task.name for task in old}
    named = []
    for task in new:
        original, number = original_name(task.name), 1
        name = original
        while name in taken:
            number += 1
            name = f"{original} ({number})"
        taken.add(name)
        named.append(replace(task, name=name))
    return named


def differing_spaces(one: Suite, other: Suite) -> list[tuple[str, Any, Any]]:
    """Return the spaces in which two suites differ: name, and both spaces."""
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in ("observation_space", "action_space")]
    return [
        (name, mine, theirs)
        for name, mine, theirs in pairs
        if mine.shape != theirs.shape or getattr(mine, "n", None) != getattr(theirs, "n", None)
    ]


def measure(tasks: Sequence[SequenceTask]) -> str:
    """Return ``success`` where all suites have it, otherwise ``return``."""
    return "success" if all(task.suite.has_success for task in tasks) else "return"
