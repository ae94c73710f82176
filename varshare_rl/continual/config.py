"""The typed configuration of a continual-learning run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.config import CHANGEABLE, TrainConfig, read_config
from varshare_rl.config_checks import check_config
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.shared import SharedConfig
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.optim.gradient import MEAN
from varshare_rl.optim.optimizer import PosteriorOptimizer
from varshare_rl.registry import register, registered
from varshare_rl.transfer.networks import CriticCarry

#: Options of ``elbo`` that a method has its own of, if any: it pays for its posteriors itself.
PAID_BY_METHOD = (
    "kl_weight", "normalization", "likelihood", "networks", "prior_scale", "prior_units", "start", "schedule",
    "prior",
)  # fmt: skip


class TaskIds(Enum):
    """Knowledge of a policy in evaluation: the task that it is in, or not."""

    known = "known"
    hidden = "hidden"  # the learnt task whose policy earns the most in a few episodes is taken


@dataclass
class CarryConfig:
    """Options of ``carry``: parts beside the policy that go from one task to the next."""

    critic: CriticCarry = CriticCarry.finetune
    "The critic goes on learning, is `fresh` for every task, or is kept as the policy is (`method`)."
    optimizer: bool = False
    "The moments of the policy's optimiser go on; for methods that keep their parameters."
    replay: bool = False
    "SAC's replay goes on."


@register("command", "continual")
@dataclass
class ContinualConfig(TrainConfig):
    """A sequence of tasks, learnt one after another. ``env.tasks`` are the tasks in order.

    ``total_transitions`` are divided equally among the tasks; ``evaluate.every``, ``checkpoint.every`` and
    ``log.every`` count within a task.
    """

    groups: ClassVar[tuple[str, ...]] = (*TrainConfig.groups, "method")
    #: The budget is divided among the tasks when the first one begins.
    changeable: ClassVar[tuple[str, ...]] = tuple(name for name in CHANGEABLE if name != "total_transitions")

    method: Any = MISSING
    "The way of the policy's network from task to task: `method=<name>`, with options of its own."
    pretrained: str | None = None
    """`from=` on the command line: a run folder of `network=varshare_lora`, `lora` or `l2_soft` to go on from. Its
    shared weights are the base and its tasks the old ones (one that is learnt again is `<task> (2)`); `network`,
    `critic`, how observations are normalised, `policy`, `log_std` and `initial_log_std` are as there."""
    repeats: int = bounded(1, least=1)
    "Times that the tasks come round."
    carry: CarryConfig = field(default_factory=CarryConfig)
    "Parts beside the policy that go from one task to the next."
    task_ids: TaskIds = TaskIds.known
    "`hidden`: nobody tells a policy in evaluation which task it is in."
    averaged_evaluations: int = bounded(1, least=1)
    """Evaluations at the end of a task's training, `evaluate.every` apart, that results are the means of: all tasks
    are evaluated in each. Continual World has 5."""
    selection_episodes: int = bounded(64, least=1)
    "Episodes of each task spent on finding a policy, with hidden ids."
    similar_episodes: int = bounded(16, least=1)
    "Episodes of each earlier policy on a new task, for `method.start=similar`."
    memory_transitions: int = bounded(2000, least=1)
    "Transitions made with the policy after each task, for what a method keeps; not counted as training."

    def check(self, prefix: str) -> None:
        """Raise UserError for what a sequence cannot be, though a training run can."""
        if type(self.network) is not SharedConfig:
            raise UserError(
                f"network={self.network.name} is for many tasks at once; here the method says what the layers are: "
                "leave network out, and give sizes as network.hidden=[64,64]"
            )
        if self.network.active_parameters is not None:
            raise UserError("network.active_parameters counts parameters of many tasks; give network.hidden here")
        for name, part in (("network", self.network), ("critic", self.critic)):
            for key in ("initialization", "output_gain"):
                if getattr(part, key) != getattr(type(part)(), key):
                    raise UserError(f"{name}.{key} is given, and here the method makes the layers; leave it out")
        if self.algorithm.resets:
            raise UserError(
                f"algorithm.resets is {self.algorithm.resets}; a task's network cannot start anew here, give 0"
            )
        self._check_losses()
        if self.task_ids is TaskIds.hidden and self.averaged_evaluations > 1:
            raise UserError(
                f"averaged_evaluations is {self.averaged_evaluations}, and those while a task is learnt know "
                "its id; with task_ids=hidden give 1"
            )
        if self.carry.replay and not isinstance(self.algorithm, SACConfig):
            raise UserError(f"carry.replay=true, and algorithm={self.algorithm.name} has no replay memory; use sac")
        if self.carry.optimizer and not self.method.keeps_parameters:
            keep = ", ".join(name for name, method in registered("method").items() if method.keeps_parameters)
            raise UserError(
                f"carry.optimizer=true, and method={self.method.name} trains other parameters in every task; "
                f"leave it out, or use one of {keep}"
            )
        start = getattr(getattr(self.method, "start", None), "value", "previous")
        if self.carry.optimizer and start != "previous":
            raise UserError(
                f"carry.optimizer=true, and method.start={start} begins every task with other weights; leave it out"
            )

    def _check_losses(self) -> None:
        if self.elbo.absorb.every:
            raise UserError("elbo.absorb would move what earlier tasks use; leave it at 0 here")
        if self.optimizer.posteriors is not PosteriorOptimizer.adam:
            raise UserError(
                f"optimizer.posteriors={self.optimizer.posteriors.value} is for training many tasks; methods of a "
                "sequence pay for their posteriors themselves, use adam"
            )
        usual = type(self.elbo)()
        for name in ("estimator", "weight_samples"):
            if getattr(self.elbo, name) != getattr(usual, name):
                raise UserError(
                    f"elbo.{name} is given, and a method's layers draw one set of weights for a task; leave it out"
                )
        for part in ("actor", "critic"):
            name = getattr(self.gradient, part)
            if name != MEAN:
                raise UserError(
                    f"gradient.{part}={name} combines tasks, and here one is learnt at a time; use mean"
                )


def check_new(config: ContinualConfig) -> None:
    """Check the configuration of a sequence that begins, see :func:`check_config`.

    Besides, it has no option of ``elbo`` that no method uses; stored ones may have former defaults of these, and
    draws in the evaluations while a task is learnt, which those after it never had.
    """
    check_config(config)
    if config.elbo.draw.evaluation is not Resample.mean:
        raise UserError(
            f"elbo.draw.evaluation={config.elbo.draw.evaluation.value} draws weights, and a sequence is evaluated "
            "with the policies that its method keeps, which are those of posterior means; use mean"
        )
    usual = type(config.elbo)()
    for name in PAID_BY_METHOD:
        if getattr(config.elbo, name) != getattr(usual, name):
            raise UserError(
                f"elbo.{name} is given, and a method of a sequence pays for its posteriors itself "
                "(method.kl_weight of those that have one); leave it out"
            )


def load_continual_config(path: Path) -> ContinualConfig:
    """Read the ``config.yaml`` of a sequence's folder and check it; errors as in :func:`read_config`."""
    config = read_config(path, ContinualConfig)
    check_config(config)
    return config


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
