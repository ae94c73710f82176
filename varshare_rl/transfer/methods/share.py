"""Share on a sequence: one low-rank basis for all tasks' corrections (arXiv 2602.06043)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter
from varshare_rl.errors import UserError
from varshare_rl.fields import bounded, check_bounds
from varshare_rl.registry import register
from varshare_rl.transfer.bases import LowRankMethod, weighted_kl
from varshare_rl.transfer.low_rank import adapter_bytes, adapter_of, adapter_state
from varshare_rl.transfer.low_rank import take_adapter as take_lora
from varshare_rl.transfer.method import ContinualMethodConfig, NetworkSpec, Pretrained, StorageCost
from varshare_rl.transfer.share.coefficients import GaussianCoefficients
from varshare_rl.transfer.share.config import THIRD, BasisMethod, Merge, ShareConfig, SizeConfig, check_columns
from varshare_rl.transfer.share.folder import share_of, share_state
from varshare_rl.transfer.share.learn import (
    LearnConfig,
    attach,
    take_adapter,
    take_coefficients,
)
from varshare_rl.transfer.share.model import (
    BYTES_PER_NUMBER,
    Share,
    adapter_numbers,
    add,
    consolidate,
    put_coefficients,
)
from varshare_rl.types import Tree

#: The rule for k without another: a policy has to survive many merges.
DEFAULT_MAX_ERROR = 0.01


class Learn(Enum):
    """Trained part of a task once there is a basis."""

    directions = "directions"  # temporary directions and coefficients in them, merged into the basis afterwards
    coefficients = "coefficients"  # coefficients in the basis, which stays as it is


@register("method", "share")
@dataclass
class ShareMethodConfig(ContinualMethodConfig):
    """``method=share``. Without a rule for ``k`` it is ``k.max_error=0.01``; ``basis.method=paper`` has its own."""

    low_rank: ClassVar[bool] = True
    name: str = "share"
    rank: int = bounded(8, least=1)
    "Rank of the adapters."
    alpha: float | None = bounded(None, above=0)
    "Numerator of the adapters' scale; null: the rank."
    lr_scale: float = bounded(1.0, above=0)
    "Factor on the policy's learning rate once the base is frozen."
    rslora: bool = False
    "Scale `alpha / sqrt(rank)` (Kalajdzievski 2023) instead of `alpha / rank`."
    initial_tasks: int = bounded(4, least=1)
    "Tasks with an adapter that come before the basis is learnt in; those of `from=` count."
    learn: Learn = Learn.directions
    "Training of a task in the basis: temporary directions too, merged afterwards, or coefficients alone."
    basis: ShareConfig = field(default_factory=ShareConfig)
    "Merging of the adapters."
    merge: Merge = Merge.needed
    "Occasion on which new directions make the basis decompose again."
    phi: int | None = bounded(None, least=1)
    "Temporary directions, at most a quarter of a layer's `k`, which is what null stands for."
    p: Any = THIRD
    """Columns of the coefficients that are learnt: a number, `third` of the largest rank among the earlier tasks,
    or null for all of it, as posteriors and temporary directions have it anyway."""
    variational: bool = False
    "Coefficients with a Gaussian posterior, whose prior comes from earlier tasks."
    prior_scale: float = bounded(1.0, above=0)
    "Standard deviation of the prior without earlier tasks."
    prior_tasks: float = bounded(1.0, above=0)
    "Tasks that this prior counts for beside the earlier ones."
    kl_weight: float = bounded(0.01, least=0)
    "Weight of the divergence from the prior; 1 is the plain ELBO."
    exact_pretrained: bool = True
    "Old tasks are acted with the adapters that they came with; otherwise with what the basis rebuilds."

    def basis_options(self) -> ShareConfig:
        """Settings of merging adapters, with the rule for ``k`` of this method in place of none."""
        k = self.basis.k
        if self.basis.method is BasisMethod.paper or (k.max_error, k.explained, k.fixed) != (None, None, None):
            return self.basis
        return replace(self.basis, k=SizeConfig(max_error=DEFAULT_MAX_ERROR))

    def check(self, prefix: str) -> None:
        """Raise UserError for options that cannot be, or might turn out to be impossible after hours only."""
        check_columns(self.p, prefix)
        basis = self.basis_options()
        if basis.method is BasisMethod.delta:
            raise UserError(
                f"{prefix}basis.method is delta, in whose basis no task can be learnt; choose share or paper"
            )
        if self.variational and self.learn is Learn.directions:
            raise UserError(
                f"{prefix}variational=true needs {prefix}learn=coefficients: temporary directions have no posterior"
            )
        if self.variational and basis.keep_originals:
            raise UserError(
                f"{prefix}variational=true and {prefix}basis.keep_originals=true are both given, but posteriors "
                "are not kept through merges from originals; leave one out"
            )
        if self.variational and isinstance(self.p, int) and self.p < self.rank:
            raise UserError(
                f"{prefix}p is {self.p}, and the prior comes from tasks of rank up to {self.rank}; leave p out"
            )
        by_error = basis.size().max_error is not None
        if by_error and (basis.method is BasisMethod.paper or (basis.p is not None and basis.p < self.rank)):
            cause = "method=paper" if basis.method is BasisMethod.paper else f"p={basis.p}"
            raise UserError(
                f"{prefix}basis.{cause} cannot promise a max_error; give {prefix}basis.k.explained or k.fixed "
                "instead"
            )

    def build(self, spec: NetworkSpec, pretrained: Pretrained | None = None) -> ShareMethod:
        """Make the method."""
        return ShareMethod(self, spec, pretrained)


class ShareMethod(LowRankMethod):
    """``W_i = theta + (basis_B eps_B_i) (basis_A eps_A_i)^T`` with a frozen ``theta``.

    The tasks after that of the base learn LoRA adapters; when there are ``initial_tasks`` of them they become a
    basis, and every adapter after that joins it. Adapters of a pretrained agent become a basis at once, and are
    counted.

    An old policy never changes with ``learn=coefficients``, which leave the basis alone; it changes by a merge, by
    no more than :attr:`report` says; and never, where ``exact_pretrained`` keeps the pretrained agent's adapters.

    With ``variational`` :meth:`penalty` adds ``kl_weight * KL / n`` for ``n`` transitions. The coefficients say
    ``paid_apart``, so that the ELBO of the run does not add that divergence again.

    Attributes:
        adapters: of the pretrained agent; waiting: LoRA adapters of other tasks that are no part of a basis yet.
        share: the basis, when there is one.

    Raises:
        UserError: options that cannot be, or that might turn out to be impossible after hours only.
    """

    def __init__(self, config: ShareMethodConfig, spec: NetworkSpec, pretrained: Pretrained | None = None) -> None:
        super().__init__(config, spec, pretrained)
        check_bounds(config, "method.")
        self.basis_options = config.basis_options()
        self.waiting: dict[int, Adapter] = {}
        self.share: Share | None = None
        corrected = {task: adapter for task, adapter in enumerate(self.adapters) if adapter}
        if corrected:
            self.share = consolidate(_named(corrected), self.basis_options)

    def corrected(self, similar: int | None) -> nn.Module:
        """Make the base with a LoRA adapter, then with coefficients or temporary directions in the basis."""
        if self._learns_lora():
            return self.base.corrected(self.fresh_adapter())
        assert self.share is not None
        network = self.base.network()
        for layer in attach(network, self.share, self._learn_options(self.share), fresh=1).values():
            if isinstance(layer.coefficients, GaussianCoefficients):
                layer.coefficients.paid_apart = True
        return network

    def penalty(self, network: nn.Module, transitions: int) -> Tensor | float:
        """Return ``kl_weight * KL / transitions`` of Gaussian coefficients; nothing else pays for it."""
        return weighted_kl(network, self.config.kl_weight * self.config.variational, transitions)

    def end(self, network: nn.Module, inputs: Tensor) -> None:
        """Keep the base, the adapter, or the coefficients; consolidate and merge when it is time."""
        task = str(self.tasks)
        if self.base.weights is None:
            self.base.keep(network)
        elif self._learns_lora():
            self._take_lora(self.tasks, take_lora(network))
        elif self.config.learn is Learn.coefficients:
            assert self.share is not None
            self.share = put_coefficients(self.share, task, take_coefficients(network, 0))
        else:
            assert self.share is not None
            self.share = add(self.share, {task: take_adapter(network, 0)}, self.config.merge)
        self.tasks += 1

    def adapter(self, task: int) -> Adapter:
        """Return a task's correction as it is rebuilt by now, or as it was learnt."""
        if self._exact(task):
            return self.adapters[task]
        if self.share is not None and str(task) in self.share.tasks:
            return self.share.rebuild(str(task))
        return self.waiting.get(task, {})

    @property
    def report(self) -> list[dict[str, Any]]:
        """Rows by layer and task in the basis: ``error``, the distance of a task's correction from the learnt one.

        ``||dW - rebuilt|| / ||dW||``, exact at the first merge and an upper bound after further ones.
        ``exact``: the policy uses the correction itself all the same. ``k`` and ``merges`` are those of the basis.
        """
        if self.share is None:
            return []
        return [
            {
                "layer": layer,
                "task": int(task),
                "error": error,
                "exact": self._exact(int(task)),
                "k": self.share.layers[layer].k,
                "merges": self.share.merges,
            }
            for layer, errors in self.share.errors().items()
            for task, error in errors.items()
        ]

    def stored(self) -> StorageCost:
        """Return the bytes of base and bases, of every task's policy, and of what only merges and priors need.

        The last are kept originals, and the coefficients of tasks that act with a pretrained adapter.
        """
        exact = [adapter for task, adapter in enumerate(self.adapters) if self._exact(task)]
        cost = StorageCost(self.base.bytes(), sum(map(adapter_bytes, [*self.waiting.values(), *exact])))
        if self.share is None:
            return cost
        layers = self.share.layers.values()
        cost += StorageCost(BYTES_PER_NUMBER * sum(layer.shared_numbers() for layer in layers))
        for index, name in enumerate(self.share.tasks):
            own = BYTES_PER_NUMBER * sum(layer.task_numbers(index) for layer in layers)
            if self._exact(int(name)):
                cost += StorageCost(memory=own)  # an original would be the adapter once more
            else:
                kept = BYTES_PER_NUMBER * adapter_numbers(self.share.originals.get(name, {}))
                cost += StorageCost(tasks=own, memory=kept)
        return cost

    def state(self) -> Tree:
        """Return the base unless it is the pretrained agent's, adapters that wait, and the basis."""
        return {
            **super().state(),
            "waiting": {str(task): adapter_state(adapter) for task, adapter in self.waiting.items()},
            "share": None if self.share is None else share_state(self.share),
        }

    def load_state(self, state: Tree) -> None:
        super().load_state(state)
        self.waiting = {int(task): adapter_of(adapter) for task, adapter in state["waiting"].items()}
        self.share = None if state["share"] is None else share_of(state["share"], self.basis_options)

    def _learns_lora(self) -> bool:
        known = len(self.waiting) + (0 if self.share is None else len(self.share.tasks))
        first: int = self.config.initial_tasks
        return known < first

    def _take_lora(self, task: int, adapter: Adapter) -> None:
        if self.share is not None:  # of a pretrained agent with fewer tasks than are to come first
            self.share = add(self.share, {str(task): adapter}, self.config.merge)
            return
        self.waiting[task] = adapter
        if len(self.waiting) == self.config.initial_tasks:
            self.share = consolidate(_named(self.waiting), self.basis_options)
            self.waiting = {}

    def _learn_options(self, share: Share) -> LearnConfig:
        config = self.config
        phi = None
        if config.learn is Learn.directions:
            most = max(1, max(layer.k for layer in share.layers.values()) // 4)
            phi = most if config.phi is None else min(config.phi, most)
        return LearnConfig(config.p, phi, config.variational, config.prior_scale, config.prior_tasks)

    def _exact(self, task: int) -> bool:
        return task < self.old_tasks and bool(self.config.exact_pretrained)


def _named(adapters: dict[int, Adapter]) -> dict[str, Adapter]:
    return {str(task): adapter for task, adapter in adapters.items()}
