"""Parts of methods with one frozen network and a low-rank correction of it for every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, LowRank
from varshare_rl.errors import UserError
from varshare_rl.nn.layer import task_layers
from varshare_rl.nn.lora import ResidualLayer
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.ops.gaussian import softplus_sigma
from varshare_rl.transfer.method import NetworkSpec, Pretrained, tensor_bytes
from varshare_rl.transfer.share.factors import NUMERICAL_ZERO, balance
from varshare_rl.types import Tree

#: Standard deviations of factors by path, ``(a [r, in], b [out, r])``, as in :class:`Pretrained`.
Sigmas = Mapping[str, tuple[Tensor, Tensor]]


class FrozenBase:
    """Weights that all tasks share: the pretrained agent's, or those of the first task, and never changed again.

    Args:
        spec: of the network.
        pretrained: gives the weights, if there is one.

    Attributes:
        weights: state dict of a plain network; None before the first task is learnt.

    Raises:
        UserError: an adapter of the pretrained agent is for other layers than the network has.
    """

    def __init__(self, spec: NetworkSpec, pretrained: Pretrained | None) -> None:
        self.spec, self.given = spec, pretrained is not None
        self.weights: dict[str, Tensor] | None = None
        if pretrained is not None:
            self.weights = {name: value.detach().cpu().clone() for name, value in pretrained.base.items()}
            sizes = {path: (layer.in_features, layer.out_features) for path, layer in self.layers().items()}
            for number, adapter in enumerate(pretrained.adapters):
                _check_fits(number, adapter, sizes)

    def network(self) -> nn.Module:
        """Make the plain network, none of whose parameters is trained; torch's random state stays as it was."""
        assert self.weights is not None
        with torch.random.fork_rng(devices=[]):
            network = self.spec.plain()
        network.load_state_dict(self.weights)
        return network.requires_grad_(False)

    def layers(self) -> dict[str, SharedLayer]:
        """Return its linear layers by path."""
        return linear_layers(self.network())

    def keep(self, network: nn.Module) -> None:
        """Take the weights of the network that learnt the first task."""
        self.weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}

    def corrected(self, adapter: Adapter, dropout: float = 0.0, subtract: bool = False) -> nn.Module:
        """Make the network with ``adapter`` in its place, whose factors alone are trained; see :func:`correct`.

        ``subtract`` takes the adapter from the frozen weights, so that the network is the base at the start.
        """

        def layer(path: str, inputs: int, outputs: int) -> nn.Module | None:
            if path not in adapter:
                return None
            factors = adapter[path]
            made = ResidualLayer(inputs, outputs, 1, factors.rank, dropout=dropout)
            made.scale = factors.scale
            with torch.no_grad():
                made.factors_A[0].copy_(factors.a)
                made.factors_B[0].copy_(factors.b)
            return made

        with torch.random.fork_rng(devices=[]):
            network = correct(self.network(), layer)
        if subtract:
            for path, factors in adapter.items():
                theta = network.get_parameter(f"{path}.theta")
                theta.sub_(factors.delta())
        return network

    def bytes(self) -> int:
        """Return the bytes of the weights."""
        return 0 if self.weights is None else tensor_bytes(*self.weights.values())

    def state(self) -> Tree | None:
        """Return the weights, unless the pretrained agent gives them."""
        return None if self.given else self.weights

    def load_state(self, state: Tree | None) -> None:
        """Put back what :meth:`state` gave."""
        if not self.given:
            self.weights = state


def linear_layers(network: nn.Module) -> dict[str, SharedLayer]:
    """Return the linear layers of a plain network by path, in order."""
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, SharedLayer)}


def correct(network: nn.Module, make: Callable[[str, int, int], nn.Module | None]) -> nn.Module:
    """Replace the linear layers of a frozen plain network, in place, by layers of one task with a correction.

    ``make`` gives a layer with ``theta`` and ``bias`` for a path, an input and an output size, or None where all
    stays as it is. Weight and bias of the old layer go into the new one and are not trained there either.
    """
    for path, old in linear_layers(network).items():
        new = make(path, old.in_features, old.out_features)
        if new is None:
            continue
        for name in ("theta", "bias"):
            setattr(new, name, nn.Parameter(getattr(old, name).detach().clone(), requires_grad=False))
        network.set_submodule(path, new)
    return network


def take_adapter(network: nn.Module, task: int = 0) -> Adapter:
    """Copies of a task's factors, or of the means of their posteriors, by path, on the CPU."""
    parts = {path: layer.correction(task) for path, layer in task_layers(network)}
    return {
        path: LowRank(part.a.cpu(), part.b.cpu(), part.scale) for path, part in parts.items() if part is not None
    }


def take_sigma(network: nn.Module, task: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """The standard deviations of a task's factors by path, on the CPU; empty without posteriors."""
    rhos = {path: layer.task_rho(task) for path, layer in task_layers(network)}
    return {
        path: (softplus_sigma(rho["rho_A"]).cpu(), softplus_sigma(rho["rho_B"]).cpu())
        for path, rho in rhos.items()
        if rho
    }


def mean_of(adapters: Sequence[Adapter], fresh: Adapter) -> Adapter:
    """Return the mean of some corrections, as nearly as the ranks of ``fresh`` allow.

    ``1/n sum_i s_i b_i a_i``, truncated to the rank by its singular value decomposition (the best of this rank,
    Eckart and Young 1936), which is split evenly between the factors; it is worked out from the factors alone. A
    layer that an adapter lacks counts as a correction of 0. Where the mean has a lower rank than there is room for,
    ``a`` and ``b = 0`` of ``fresh`` fill up: two zeros would never move. One adapter of the right rank and scale is
    given back as it is.
    """
    mean = {}
    for path, start in fresh.items():
        parts = [adapter[path] for adapter in adapters if path in adapter]
        if len(adapters) == len(parts) == 1 and (parts[0].rank, parts[0].scale) == (start.rank, start.scale):
            mean[path] = parts[0]
        else:
            mean[path] = _truncated(parts, len(adapters), start) if parts else start
    return mean


def _truncated(parts: Sequence[LowRank], count: int, start: LowRank) -> LowRank:
    """Return ``1 / count`` of the sum of ``parts`` in the rank and scale of ``start``."""
    left = torch.cat([part.b.double() * (part.scale / (count * start.scale)) for part in parts], dim=1)
    right = torch.cat([part.a.double().t() for part in parts], dim=1)
    left, right, singular = (side[0] for side in balance(left[None], right[None]))
    kept = min(start.rank, int((singular > NUMERICAL_ZERO * singular[0]).sum()))
    a, b = start.a.clone(), start.b.clone()
    a[:kept], b[:, :kept] = right[:, :kept].t(), left[:, :kept]
    return LowRank(a, b, start.scale)


def adapter_bytes(adapter: Adapter) -> int:
    """Return the bytes of an adapter's factors."""
    return sum(tensor_bytes(factors.a, factors.b) for factors in adapter.values())


def sigma_bytes(sigma: Sigmas) -> int:
    """Return the bytes of standard deviations."""
    return sum(tensor_bytes(*pair) for pair in sigma.values())


def adapter_state(adapter: Adapter) -> Tree:
    """Return an adapter as a tree."""
    return {path: {"a": part.a, "b": part.b, "scale": part.scale} for path, part in adapter.items()}


def adapter_of(state: Tree) -> Adapter:
    """Return the adapter of which :func:`adapter_state` made a tree."""
    return {path: LowRank(part["a"], part["b"], part["scale"]) for path, part in state.items()}


def _check_fits(number: int, adapter: Adapter, sizes: Mapping[str, tuple[int, int]]) -> None:
    for path, factors in adapter.items():
        if sizes.get(path) != (factors.in_features, factors.out_features):
            size = sizes.get(path, (0, 0))
            raise UserError(
                f"the pretrained agent's task {number} has a correction of {factors.out_features} x "
                f"{factors.in_features} at {path}, where the network has {size[1]} x {size[0]}; "
                "give the network of the pretrained agent"
            )
