"""The typed configuration of a continual-learning run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.config import (
    COMPONENTS,
    TrainConfig,
    blank_config,
    read_config,
    register_components,
)
from varshare_rl.config_checks import check_config, check_limits
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.nn.shared import SharedConfig
from varshare_rl.optim.aggregators import AggregatorName
from varshare_rl.transfer.method import ContinualMethod, ContinualMethodConfig, NetworkSpec, Pretrained
from varshare_rl.transfer.methods.copies import Copies, CopiesConfig
from varshare_rl.transfer.methods.ewc import EWC, EWCConfig
from varshare_rl.transfer.methods.finetune import Finetune, FinetuneConfig
from varshare_rl.transfer.methods.frozen import Frozen, FrozenConfig
from varshare_rl.transfer.methods.lora import LoRAMethod, LoRAMethodConfig
from varshare_rl.transfer.methods.packnet import PackNet, PackNetConfig
from varshare_rl.transfer.methods.pnn import PNN, PNNConfig
from varshare_rl.transfer.methods.replay import ExperienceReplay, ExperienceReplayConfig
from varshare_rl.transfer.methods.share import ShareMethod, ShareMethodConfig
from varshare_rl.transfer.methods.shared_private import SharedPrivate, SharedPrivateConfig
from varshare_rl.transfer.methods.varshare import VarShareMethod, VarShareMethodConfig
from varshare_rl.transfer.networks import CriticCarry

#: The methods: options and class by name of the group ``method``.
METHODS: dict[str, tuple[type[ContinualMethodConfig], type[ContinualMethod]]] = {
    "finetune": (FinetuneConfig, Finetune),
    "copies": (CopiesConfig, Copies),
    "frozen": (FrozenConfig, Frozen),
    "shared_private": (SharedPrivateConfig, SharedPrivate),
    "ewc": (EWCConfig, EWC),
    "replay": (ExperienceReplayConfig, ExperienceReplay),
    "packnet": (PackNetConfig, PackNet),
    "pnn": (PNNConfig, PNN),
    "lora": (LoRAMethodConfig, LoRAMethod),
    "share": (ShareMethodConfig, ShareMethod),
    "varshare": (VarShareMethodConfig, VarShareMethod),
}
CONTINUAL_COMPONENTS = {**COMPONENTS, "method": {name: options for name, (options, _) in METHODS.items()}}

#: Least and most of options that some methods have; None: no bound.
METHOD_RANGES: dict[str, tuple[float, float | None]] = {
    "rank": (1, None),
    "phi": (1, None),
    "p": (1, None),
    "initial_tasks": (0, None),
    "kl_weight": (0, None),
    "weight": (0, None),
    "fisher_samples": (1, None),
    "decay": (0, 1),
    "samples_per_task": (1, None),
    "batch": (1, None),
    "share_per_task": (0, 1),
    "prune_at": (0, 1),
    "lateral": (1, None),
}


class TaskIds(Enum):
    """Whether a policy is told in evaluation which task it is in."""

    known = "known"
    hidden = "hidden"  # the learnt task whose policy earns the most in a few episodes is taken


@dataclass
class CarryConfig:
    """Options of ``carry``: what besides the policy goes from one task to the next."""

    critic: CriticCarry = CriticCarry.finetune
    optimizer: bool = False  # moments of the optimisers; for methods that keep their parameters
    replay: bool = False  # SAC's memory


@dataclass
class ContinualConfig(TrainConfig):
    """A sequence of tasks, learnt one after another. ``env.tasks`` are the tasks in order.

    ``total_transitions`` are divided equally among the tasks; ``evaluate.every``, ``checkpoint.every`` and
    ``log.every`` count within a task.
    """

    method: Any = MISSING
    pretrained: str | None = None  # run folder of an agent to go on from (``from=`` on the command line)
    repeats: int = 1  # how many times the tasks come round
    carry: CarryConfig = field(default_factory=CarryConfig)
    task_ids: TaskIds = TaskIds.known
    selection_episodes: int = 64  # of each task spent on finding a policy, with hidden ids
    similar_episodes: int = (
        16  # of each earlier policy on a new task, where the method starts from the most similar
    )
    memory_transitions: int = 2000  # made with the policy after each task, for what the method keeps of it


def blank_continual_config() -> ContinualConfig:
    """The configuration with nothing chosen yet."""
    return ContinualConfig(elbo=blank_config().elbo)


def register_continual_schemas() -> None:
    """Make the typed options known to Hydra."""
    ConfigStore.instance().store(name="continual_schema", node=blank_continual_config())
    register_components(CONTINUAL_COMPONENTS)


def load_continual_config(path: Path) -> ContinualConfig:
    """Read the ``config.yaml`` of a sequence's folder and check it; errors as in :func:`read_config`."""
    config = cast(ContinualConfig, read_config(path, blank_continual_config(), CONTINUAL_COMPONENTS))
    check_continual_config(config)
    return config


def method_maker(config: ContinualConfig) -> Callable[[NetworkSpec, Pretrained | None], ContinualMethod]:
    """Makes the chosen method for a network."""
    made = METHODS[config.method.name][1]
    return lambda shape, pretrained: made(config.method, shape, pretrained)


def check_continual_config(config: ContinualConfig) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        UserError: names the option, its value, and what is allowed.
    """
    check_config(config)
    names = ("repeats", "selection_episodes", "similar_episodes", "memory_transitions")
    check_limits((name, getattr(config, name), 1, None) for name in names)
    method = config.method
    check_limits(
        (f"method.{name}", getattr(method, name), *bounds)
        for name, bounds in METHOD_RANGES.items()
        if hasattr(method, name)
    )
    for name in ("alpha", "prior_scale", "prior_tasks", "share_per_task"):
        value = getattr(method, name, None)
        if value is not None and not value > 0:
            raise UserError(f"method.{name} is {value:g}; it must be positive")
    if type(config.network) is not SharedConfig:
        raise UserError(
            f"network={config.network.name} is for many tasks at once; here the method says what the layers are: "
            "leave network out, and give sizes as network.hidden=[64,64]"
        )
    if config.network.active_parameters is not None:
        raise UserError("network.active_parameters counts parameters of many tasks; give network.hidden here")
    if config.algorithm.resets:
        raise UserError(
            f"algorithm.resets is {config.algorithm.resets}; a task's network cannot start anew here, give 0"
        )
    if config.elbo.absorb.every:
        raise UserError("elbo.absorb would move what earlier tasks use; leave it at 0 here")
    usual = blank_config().elbo
    for name in ("estimator", "weight_samples", "temperature"):
        if getattr(config.elbo, name) != getattr(usual, name):
            raise UserError(
                f"elbo.{name} is given, and a method's layers draw one set of weights for a "
                "task, at its temperature 1; leave it out"
            )
    for part in ("actor", "critic"):
        aggregator = getattr(config.gradient, part)
        if aggregator is not AggregatorName.mean:
            raise UserError(
                f"gradient.{part}={aggregator.value} combines tasks, and here one is learnt at a time; use mean"
            )
    if config.carry.replay and not isinstance(config.algorithm, SACConfig):
        raise UserError(f"carry.replay=true, and algorithm={config.algorithm.name} has no replay memory; use sac")
    if config.carry.optimizer and not METHODS[config.method.name][1].keeps_parameters:
        keep = ", ".join(name for name, (_, made) in METHODS.items() if made.keeps_parameters)
        raise UserError(
            f"carry.optimizer=true, and method={config.method.name} trains other parameters in every task; "
            f"leave it out, or use one of {keep}"
        )


def with_task_list(env: Any, suite: Suite) -> Any:
    """The options of an environment with its tasks as a list, for suites that know them by another name too.

    Meta-World's benchmarks draw goals for all tasks together, so a task's goals depend on the list; named one by
    one, tasks have goals of their own.
    """
    if getattr(env, "benchmark", None) is not None:
        return replace(env, benchmark=None, tasks=list(suite.task_names))
    return env


def one_task(env: Any, suite: Suite, index: int) -> Any:
    """The options of an environment with one of its tasks.

    Raises:
        UserError: the suite is not a list of tasks.
    """
    if hasattr(env, "ids"):
        return replace(env, ids=[env.ids[index]])
    if not hasattr(env, "tasks"):
        raise UserError(f"env={env.name} has no list of tasks that could be learnt one by one")
    changes: dict[str, Any] = {"tasks": [suite.task_names[index]]}
    if getattr(env, "reward_scales", None):
        changes["reward_scales"] = [env.reward_scales[index]]
    return replace(env, **changes)


def train_config(config: ContinualConfig, **changes: Any) -> TrainConfig:
    """The part that is a training run, with changes."""
    own = {entry.name: getattr(config, entry.name) for entry in fields(TrainConfig)}
    return TrainConfig(**{**own, **changes})
