"""Updates of a few tasks at a time, whose cost does not grow with the number of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varshare_rl.nn.task_rows import ActiveTasks, restrict_tasks
from varshare_rl.optim.divergence_guard import DivergenceGuardConfig
from varshare_rl.optim.elbo import ElboConfig
from varshare_rl.optim.gradient import MEAN, GradientConfig
from varshare_rl.optim.kl_schedules import DualConfig
from varshare_rl.optim.priors import FixedPriorConfig
from varshare_rl.state import Stateful

#: Tasks of an update that is not told how many, where what they have of their own is most of what it steps. With as
#: many rows in all, an update of 50 tasks takes 1.4 times as long as one of 10, and one of 500 takes 6.1 times.
MOST_AT_ONCE = 50


def compared(gradient: GradientConfig, elbo: ElboConfig, divergence_guard: DivergenceGuardConfig) -> dict[str, str]:
    """Return the options that compare all tasks at every update, each with what to give instead."""
    found = {
        f"gradient.{part}={name}": "gradient=mean"
        for part, name in (("actor", gradient.actor), ("critic", gradient.critic))
        if name != MEAN
    }
    if isinstance(elbo.schedule, DualConfig):
        found["elbo/schedule=dual"] = "another schedule"
    if not isinstance(elbo.prior, FixedPriorConfig):
        found[f"elbo/prior={elbo.prior.name}"] = "elbo/prior=fixed"
    if divergence_guard.explosion:
        found[f"divergence_guard.explosion={divergence_guard.explosion:g}"] = "divergence_guard.explosion=0"
    return found


class TaskSubset(Stateful):
    """A few of the tasks, whose rows stand for all in what is kept per task, for the time of an update.

    Every layer keeps its stacks ``[T, ...]``. During a turn each of them is ``[K, ...]``, the rows of the subset's
    tasks, in parameters, buffers and the state of optimisers; so passes, divergences, gradients and steps are those
    of ``K`` tasks. At its end the rows go back. A task's rows and moments change in its own turns alone, as with
    lazily updated embeddings, and Adam corrects their bias by the number of those.

    No graph of autograd with a stack in it may outlive its turn, or the next one finds the wrong shape.

    Tasks take turns: every pass goes through all of them in a new random order, in subsets of nearly equal size.

    Args:
        num_tasks: ``T``.
        size: the most tasks of a subset, ``K``; with ``T`` or more there are no subsets.
        modules: they have stacks, named in ``per_task_parameters`` and ``per_task_buffers``.
        parameters: further stacks, outside modules.
        optimizers: of all of these.
    """

    state_fields = ("order", "passes", "next", "born")

    def __init__(
        self,
        num_tasks: int,
        size: int,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.num_tasks, self.size = num_tasks, min(size, num_tasks)
        children = list({id(child): child for module in modules for child in module.modules()}.values())
        self._buffers = [(child, name) for child in children for name in getattr(child, "per_task_buffers", ())]
        stacks = [
            child.get_parameter(name) for child in children for name in getattr(child, "per_task_parameters", ())
        ]
        self._stacks = list({id(stack): stack for stack in [*parameters, *stacks]}.values())  # each once
        self._optimizers = {
            id(parameter): optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.order = torch.arange(num_tasks)
        self.passes = 0
        self.next = 0  # turn of this pass
        self.born: dict[int, int] = {}  # by stack: passes before the first with its present moments

    @property
    def share(self) -> float:
        """Share of the tasks that are in one subset."""
        return self.size / self.num_tasks

    @property
    def turns(self) -> int:
        """Number of turns in a pass."""
        return -(-self.num_tasks // self.size)

    @contextmanager
    def turn(self) -> Iterator[Tensor | None]:
        """Have the next tasks stand for all inside; gives their ids ``[K]``, or None where they are all."""
        if self.turns == 1:
            yield None
            return
        if self.next == 0:
            self.order = torch.randperm(self.num_tasks)
        ids = self.order.tensor_split(self.turns)[self.next]
        close = self._open(ids)
        try:
            with restrict_tasks(ActiveTasks(ids, self.num_tasks)):
                yield ids
        finally:
            close()
        self.next = (self.next + 1) % self.turns
        self.passes += self.next == 0

    def _open(self, ids: Tensor) -> Callable[[], None]:
        """Put rows in the place of stacks; returns a function that puts them back."""
        closing = [self._parameter(number, stack, ids) for number, stack in enumerate(self._stacks)]
        closing += [_buffer(module, name, ids) for module, name in self._buffers]

        def close() -> None:
            for one in closing:
                one()

        return close

    def _parameter(self, number: int, parameter: nn.Parameter, ids: Tensor) -> Callable[[], None]:
        stack, rows = parameter.data, ids.to(parameter.device)
        parameter.data, parameter.grad = stack.index_select(0, rows), None
        optimizer = self._optimizers.get(id(parameter))
        moments: dict[str, Tensor] = {}
        if optimizer is not None and parameter in optimizer.state:
            state = optimizer.state[parameter]
            if number not in self.born:  # moments from before there were subsets
                self.born[number] = self.passes - int(state["step"])
            moments = _take_moments(state, rows)
            state["step"].fill_(self.passes - self.born[number])
        else:
            self.born[number] = self.passes

        def close() -> None:
            stack.index_copy_(0, rows, parameter.data)
            parameter.data, parameter.grad = stack, None
            if optimizer is not None and parameter in optimizer.state:
                _put_moments(optimizer.state[parameter], moments, stack, rows)

        return close


def _take_moments(state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Leave the rows of the moments, a parameter's state but its count of steps; returns the stacks."""
    stacks = {name: moment for name, moment in state.items() if name != "step"}
    state.update({name: moment.index_select(0, rows) for name, moment in stacks.items()})
    return stacks


def _put_moments(state: dict[str, Tensor], stacks: dict[str, Tensor], like: Tensor, rows: Tensor) -> None:
    """Put the moments' rows back, into zeros where this turn has made them."""
    for name, moment in state.items():
        if name != "step":
            stack = stacks[name] if name in stacks else torch.zeros_like(like)
            state[name] = stack.index_copy_(0, rows, moment)


def _buffer(module: nn.Module, name: str, ids: Tensor) -> Callable[[], None]:
    stack = module.get_buffer(name)
    rows = ids.to(stack.device)
    setattr(module, name, stack.index_select(0, rows))

    def close() -> None:
        stack.index_copy_(0, rows, module.get_buffer(name))
        setattr(module, name, stack)

    return close
