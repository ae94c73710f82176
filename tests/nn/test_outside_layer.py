"""A layer that the package does not know is folded, exported, pruned, absorbed and measured by what it answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from varshare_rl.adapters.agent import base_network, task_adapter
from varshare_rl.errors import UserError
from varshare_rl.nn.absorb import absorb
from varshare_rl.nn.layer import AbsorptionMove, TaskLayer, linear_parameters, plain_linear
from varshare_rl.nn.merge import merged
from varshare_rl.nn.mlp import TaskMLP
from varshare_rl.nn.parameters import count_parameters, total_kl
from varshare_rl.nn.prune import Criterion, prune
from varshare_rl.nn.sharing import measure_sharing
from varshare_rl.nn.stochastic import GaussianFactors
from varshare_rl.nn.task_rows import TaskIds, TaskRows, task_rows
from varshare_rl.nn.uncertainty import layer_moments, linearised, sample_outputs
from varshare_rl.nn.weight_sampler import Resample, WeightSampler
from varshare_rl.ops.gaussian import inverse_softplus, prior_nats, softplus_sigma
from varshare_rl.ops.low_rank import LowRank

TASKS, IN, OUT = 3, 4, 2
IDS = torch.arange(TASKS)


class GainLayer(GaussianFactors, TaskLayer):
    """``W_i = theta + g_i u v^T`` with one Gaussian gain ``g_i`` per task, prior ``N(0, 1)``."""

    factors = (("mus", "rhos"),)
    mus: nn.Parameter
    rhos: nn.Parameter
    u: Tensor
    v: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.theta, self.bias = linear_parameters(in_features, out_features, bias=True)
        self.register_buffer("u", torch.randn(out_features))
        self.register_buffer("v", torch.randn(in_features))
        self.register_factors(TASKS)

    def fresh_factors(self, num_tasks: int) -> dict[str, Tensor]:
        return {"mus": torch.randn(num_tasks, 1, 1), "rhos": torch.full((num_tasks, 1, 1), -2.0)}

    def prior(self) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros_like(self.v[0]), torch.ones_like(self.v[0]))]

    def row_noise_sizes(self) -> tuple[int]:
        return (1,)

    def forward(self, x: Tensor, task_id: TaskIds, temperature: float = 1.0) -> Tensor:
        rows = task_rows(x, task_id, self.num_tasks)
        gains = self.drawn(self.draw_noise(self.num_tasks), temperature)[0] if self.training else self.mus
        return rows.restore(rows.x @ self.theta.t() + self.bias + rows.select(gains) * self._direction(rows.x))

    def _direction(self, x: Tensor) -> Tensor:
        return (x @ self.v).unsqueeze(-1) * self.u

    def shared_linear(self) -> nn.Linear:
        return plain_linear(self.theta, self.bias)

    def correction(self, task: int) -> LowRank:
        return LowRank(self.v.unsqueeze(0), self.mus[task, 0] * self.u.unsqueeze(1))

    def unit_nats(self) -> Tensor:
        return prior_nats(self.mus, softplus_sigma(self.rhos), torch.ones_like(self.v[0])).flatten(1).sum(1)

    def set_to_prior(self, kept: Tensor) -> None:
        keep = kept.view(-1, 1, 1)
        self.mus.copy_(torch.where(keep, self.mus, 0.0))
        self.rhos.copy_(torch.where(keep, self.rhos, inverse_softplus(torch.ones_like(self.v[0]))))

    def absorption(self, rate: float) -> AbsorptionMove:
        mus = self.mus.double()
        moved = rate * mus.mean()
        costs = (0.5 * mean.square().flatten() for mean in (mus, mus - moved))
        return AbsorptionMove(moved * self.u.outer(self.v), {"mus": mus - moved}, torch.zeros(TASKS), *costs)

    def output_variance(self, rows: TaskRows, temperature: float) -> Tensor:
        return self.variances(rows, temperature)[0] * self._direction(rows.x).square()

    def projected_variance(self, x: Tensor, slope: Tensor, temperature: float) -> Tensor:
        variance = softplus_sigma(self.rhos, temperature).square()
        along = (slope * self._direction(x)).sum(-1)
        return variance.squeeze(-1) * along.square()


def network(*hidden: int) -> TaskMLP:
    return TaskMLP([IN, *hidden, OUT], GainLayer, "tanh")


def test_it_is_folded_and_exported() -> None:
    made, x = network(5).eval(), torch.randn(TASKS, 6, IN)
    expected = made(x, IDS)
    base = base_network(made)
    for task in range(TASKS):
        torch.testing.assert_close(merged(made, task)(x[task]), expected[task])
        adapter = task_adapter(made, task)
        assert sorted(adapter) == ["0", "2"]
        corrected = base_network(made)
        with torch.no_grad():
            for path, part in adapter.items():
                corrected.get_submodule(path).get_parameter("weight").add_(part.delta())
        torch.testing.assert_close(corrected(x[task]), expected[task])
        assert not torch.allclose(base(x[task]), expected[task])
    with pytest.raises(IndexError, match="unknown task id 3: this network has 3 tasks"):
        merged(made, 3)


def test_it_is_counted_and_pays() -> None:
    made = network(5)
    assert count_parameters([made], TASKS).per_task == 2 * 2
    nats = sum(layer.unit_nats() for layer in made.layers)
    torch.testing.assert_close(total_kl(made, TASKS), nats)


def test_it_is_pruned_and_absorbed() -> None:
    layer = GainLayer(IN, OUT).eval()
    x = torch.eye(IN).expand(TASKS, IN, IN)
    outputs = layer(x, IDS).detach()
    done = absorb(layer, 1.0, max_error=0.0)[""]
    assert done.done
    assert done.rescaled == ()
    torch.testing.assert_close(layer(x, IDS), outputs)
    assert float(layer.mus.detach().mean()) == pytest.approx(0.0, abs=1e-6)
    pruned = prune(layer, 1e9)[""]
    assert not pruned.kept.any()
    torch.testing.assert_close(layer.kl(), torch.zeros(TASKS), rtol=0, atol=1e-6)
    assert (pruned.change > 0).all()
    assert prune(layer, 1.0, Criterion.snr) == {}  # it has no such units


def test_its_uncertainty_is_that_of_draws() -> None:
    layer, x = GainLayer(IN, OUT), torch.randn(TASKS, 3, IN)
    moments = layer_moments(layer, x, IDS)
    drawn = sample_outputs(layer, (x,), draws=4000, at_once=1000)
    torch.testing.assert_close(drawn.mean, moments.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std, moments.variance.sqrt(), rtol=0.1, atol=0.01)
    first_order = linearised(layer, (x,))
    torch.testing.assert_close(first_order.variance, moments.variance)


def test_it_can_be_drawn_for_acting() -> None:
    sampler = WeightSampler(Resample.per_update, network(5), TASKS, 2)
    assert [tuple(value[0].shape) for value in sampler.values.values()] == [(TASKS, 1, 1)] * 2


def test_a_layer_that_answers_nothing_is_left_out_or_refused_by_name() -> None:
    class Silent(TaskLayer):
        """Neither weights to fold nor anything else."""

    silent = TaskMLP([IN, OUT], Silent, "tanh")
    assert absorb(silent, 1.0, 1.0) == {}
    assert prune(silent, 1.0) == {}
    assert measure_sharing({"silent": silent}) is None
    with pytest.raises(UserError, match="a Silent has no weight of one task"):
        merged(silent, 0)
    with pytest.raises(UserError, match="a Silent has no low-rank correction"):
        base_network(silent)
