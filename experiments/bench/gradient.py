"""PPO's update with every way to combine the tasks' gradients, as a ratio to the mean."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from experiments.bench.contenders import Contender, Round, Setting, measure
from experiments.bench.learners import filled_ppo
from experiments.bench.report import Ratio, Section
from experiments.bench.update import (
    ARCHITECTURES,
    MINIBATCHES,
    NARROW,
    ROLLOUT,
    TASKS,
    WIDE,
    hidden_sizes,
    rounds_of,
)
from varshare_rl.optim.gradient import TEMPERATURE, GradientConfig
from varshare_rl.optim.jacobian import TaskGradients
from varshare_rl.registry import registered

SIZES = {"2 x 128": NARROW, "3 x 400": WIDE}
METHODS = [name for name in registered("gradient") if name != TEMPERATURE]  # which is SAC's
NAMES = ["shared", "varshare_lora"]
#: PCGrad with a backward pass per task: what a network without recording layers costs.
SLOW = "pcgrad, a pass per task"


class _OneByOne(TaskGradients):
    """Never records."""

    def __call__(self, losses: Tensor) -> Tensor:
        self.mixed = set(range(len(self.shared)))
        self.steps = 2  # never a power of 2 plus 1: no look for mixing
        return super().__call__(losses)


def _ppo(network: str, size: str, method: str, setting: Setting) -> Round:
    architecture = ARCHITECTURES[network](hidden_sizes(SIZES[size], setting), "tanh")
    aggregator = "pcgrad" if method == SLOW else method
    gradient = GradientConfig(aggregator, aggregator)
    algorithm = filled_ppo(architecture, TASKS, setting.pick(ROLLOUT, 8), MINIBATCHES, gradient=gradient)
    for step in (algorithm.actor_step, algorithm.critic_step) if method == SLOW else ():
        step.aggregation.gradients.__class__ = _OneByOne  # type: ignore[attr-defined]

    def update() -> None:
        algorithm.rollout.position = algorithm.rollout.vector_steps  # the same rollout again
        algorithm.update()

    per_minibatch = rounds_of(update, 1)
    return lambda: per_minibatch() / MINIBATCHES


CONTENDERS: dict[str, Contender] = {
    f"{network} {size}, {method}": partial(_ppo, network, size, method)
    for network in NAMES
    for size in SIZES
    for method in [*METHODS, SLOW]
}


def run(rounds: int, setting: Setting) -> list[Section]:
    """Both networks at both sizes."""
    sections = []
    for network in NAMES:
        for size in SIZES:
            names = [name for name in CONTENDERS if name.startswith(f"{network} {size}, ")]
            mean = f"{network} {size}, mean"
            rows = ROLLOUT // MINIBATCHES
            title = f"PPO minibatch of {TASKS} tasks x {rows} rows, {network} {size}: combinations of gradients"
            ratios = [Ratio(name, mean) for name in names if name != mean]
            sections.append(Section(title, "ms", measure(__name__, names, rounds, setting), ratios))
    return sections
