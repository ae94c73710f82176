"""Selection of a task, for a network that is not told which it is.

By return, with a bandit over the tasks' coefficients; or by TD error, from transitions alone. The mean of all
tasks' corrections is a baseline to compare with, not a way to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from varshare_rl.adapters.adapter import Adapter, LowRank
from varshare_rl.transfer.share.delta_basis import DeltaBasis, factors_of
from varshare_rl.transfer.share.factors import balance
from varshare_rl.transfer.share.layer_basis import LayerBasis
from varshare_rl.transfer.share.model import Share


class ReturnBandit:
    """UCB1 over tasks (Auer et al. 2002): act with one task's coefficients for an episode, learn from its return.

    Chooses ``argmax_i mean_i + exploration * sqrt(2 log n / n_i)`` after every task had one episode, with returns
    brought to [0, 1] by the least and the greatest seen so far.

    Args:
        num_tasks: number of tasks.
        exploration: factor on the width of the confidence interval, 1 in the source; less suits a few episodes and
            returns that differ clearly. 0 follows the best mean.

    Attributes:
        episodes: of every task so far; totals: sums of their returns.
    """

    def __init__(self, num_tasks: int, exploration: float = 0.5) -> None:
        if num_tasks < 1:
            raise ValueError(f"num_tasks is {num_tasks}; it must be positive")
        self.exploration = exploration
        self.episodes = [0] * num_tasks
        self.totals = [0.0] * num_tasks
        self._least, self._most = math.inf, -math.inf

    def choose(self) -> int:
        """Return the task whose coefficients the next episode should use."""
        if 0 in self.episodes:
            return self.episodes.index(0)
        played = sum(self.episodes)
        widths = [self.exploration * math.sqrt(2 * math.log(played) / count) for count in self.episodes]
        scores = [mean + width for mean, width in zip(self._scaled_means(), widths, strict=True)]
        return scores.index(max(scores))

    def update(self, task_id: int, episode_return: float) -> None:
        """Take in the return of an episode with a task's coefficients.

        Raises:
            IndexError: an unknown task id.
            ValueError: the return is not finite.
        """
        if not 0 <= task_id < len(self.episodes):
            raise IndexError(f"unknown task id {task_id}: this bandit has {len(self.episodes)} tasks")
        if not math.isfinite(episode_return):
            raise ValueError(f"the return of an episode is {episode_return}; it must be finite")
        self.episodes[task_id] += 1
        self.totals[task_id] += episode_return
        self._least, self._most = min(self._least, episode_return), max(self._most, episode_return)

    @property
    def best(self) -> int:
        """The task with the best mean return so far.

        Raises:
            ValueError: there was no episode yet.
        """
        if sum(self.episodes) == 0:
            raise ValueError("no episode yet; there is no best task")
        means = [
            total / count if count else -math.inf for total, count in zip(self.totals, self.episodes, strict=True)
        ]
        return means.index(max(means))

    def _scaled_means(self) -> list[float]:
        span = (self._most - self._least) or 1.0
        return [
            (total / count - self._least) / span for total, count in zip(self.totals, self.episodes, strict=True)
        ]


def for_all_tasks(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_tasks: int) -> Tensor:
    """Return a network's outputs for the same rows with every task's weights: ``[N, F]`` to ``[T, N, G]``."""
    return network(x.expand(num_tasks, *x.shape), torch.arange(num_tasks))


def task_by_td_error(
    reward: Tensor, terminated: Tensor, values: Tensor, next_values: Tensor, discount: float
) -> tuple[int, Tensor]:
    """Return the task whose critic is least surprised by transitions, and all mean squared TD errors ``[T]``.

    ``delta = r + discount * (1 - terminated) * V_i(s') - V_i(s)`` (Sutton and Barto 2018, section 6.1). Critics of
    different reward scales are not comparable: use it where tasks share one, or divide by it before.

    Args:
        reward: ``[N]``; terminated: ``[N]`` bool, a truncated successor keeps its value.
        values: ``[T, N]`` every task's value of the states, or of the actions taken there.
        next_values: ``[T, N]`` the same of the successors.
        discount: per step.

    Raises:
        ValueError: there are no transitions.
    """
    if reward.numel() == 0:
        raise ValueError("no transitions to choose a task by; give at least one")
    target = reward + discount * (~terminated).to(reward.dtype) * next_values
    errors = (target - values).square().mean(1)
    return int(errors.argmin()), errors


def average(share: Share) -> Adapter:
    """Return the mean of all tasks' corrections, as a baseline.

    The mean is taken over cores ``eps_B_i eps_A_i^T``, which are what they are in any gauge; a mean of the
    coefficients themselves would depend on each task's arbitrary signs.
    """
    return {name: _average(layer) for name, layer in share.layers.items()}


def _average(layer: LayerBasis | DeltaBasis) -> LowRank:
    if isinstance(layer, DeltaBasis):
        return factors_of(layer.coefficients.double().mean(0), layer)
    count = len(layer.coefficients)
    core = sum(own.eps_B.double() @ own.eps_A.double().t() for own in layer.coefficients) / count
    assert isinstance(core, Tensor)
    identity = torch.eye(core.shape[1], dtype=torch.float64)
    left, right, _ = balance(core[None], identity[None])
    return LowRank(
        (layer.basis_A.double() @ right[0]).t().float().contiguous(), (layer.basis_B.double() @ left[0]).float()
    )
