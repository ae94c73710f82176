"""VarShare on sequences of toy tasks: its priors, what is paid and once, and where posteriors start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from adapter_toys import IDS, IN, OUT, RANK, SHARE, SPEC, VARSHARE, inputs, learn, outputs, trained_agent
from torch import Tensor, nn

from varshare_rl.adapters.adapter import LowRank
from varshare_rl.errors import UserError
from varshare_rl.nn import VarShareLoRAConfig
from varshare_rl.nn.config import PriorUnits
from varshare_rl.nn.parameters import total_kl
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.optim.elbo import Elbo, ElboConfig
from varshare_rl.transfer.low_rank import linear_layers
from varshare_rl.transfer.method import Pretrained
from varshare_rl.transfer.methods.share import Learn, ShareMethod
from varshare_rl.transfer.methods.varshare import PosteriorStart, PriorFrom, VarShareMethod
from varshare_rl.transfer.pretrained import pretrained_from
from varshare_rl.transfer.share.coefficients import GaussianCoefficients


def posteriors_of(pretrained: Pretrained, task: int, path: str) -> tuple[LowRank, tuple[Tensor, Tensor]]:
    return pretrained.adapters[task][path], pretrained.sigmas[task][path]


def expected_kl(network: nn.Module, prior: Callable[[str], list[tuple[Tensor, Tensor]]]) -> Tensor:
    """By torch.distributions."""
    total = torch.zeros(1)
    for path, layer in network.named_modules():
        if isinstance(layer, VarShareLoRALayer):
            for (mu, rho), (mean, std) in zip(layer.posteriors(), prior(path), strict=True):
                q = torch.distributions.Normal(mu, F.softplus(rho))
                p = torch.distributions.Normal(mean.expand_as(mu), std.expand_as(mu))
                total = total + torch.distributions.kl_divergence(q, p).sum()
    return total


def disturb(network: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "rho" in name else 0.1))


def test_the_divergence_is_paid_once_and_from_the_posterior_before() -> None:
    pretrained = pretrained_from(trained_agent(3), 3)
    method = VarShareMethod(replace(VARSHARE, kl_weight=0.3), SPEC, pretrained)
    network = method.begin(3)
    start = method.penalty(network, 1)
    assert isinstance(start, Tensor)
    assert float(start.detach()) == pytest.approx(0.0, abs=1e-3)  # it starts at the prior
    disturb(network)

    def prior(path: str) -> list[tuple[Tensor, Tensor]]:
        own, (std_a, std_b) = posteriors_of(pretrained, 2, path)
        return [(own.a, std_a), (own.b, std_b)]

    expected = expected_kl(network, prior) * 0.3 / 500
    found = method.penalty(network, 500)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    elbo = Elbo(ElboConfig(kl_weight=1.0), 1)
    assert elbo.penalty(network, 500) == 0.0  # here it would be a second time
    assert elbo.penalty(trained_agent(1), 500) > 0.0
    assert method.penalty(SPEC.plain(), 500) == torch.zeros(1)
    assert VarShareMethod(replace(VARSHARE, kl_weight=0.0), SPEC, pretrained).penalty(network, 5) == 0.0


def test_a_given_prior_is_in_no_state_dict_and_follows_the_layer() -> None:
    plain, given = (VarShareLoRALayer(IN, OUT, 2, RANK) for _ in range(2))
    given.give_prior([(torch.randn(RANK, IN), torch.ones(RANK, IN)), (torch.randn(OUT, RANK), torch.ones(1))])
    assert plain.state_dict().keys() == given.state_dict().keys()
    given.load_state_dict(plain.state_dict())
    assert (given.kl() > plain.kl()).all()
    assert given.double().kl().dtype == torch.float64


def test_the_standard_prior_is_that_of_the_layer() -> None:
    absolute = replace(VARSHARE, prior_scale=0.4, prior_units=PriorUnits.absolute)
    options = replace(absolute, prior=PriorFrom.standard, kl_weight=1.0)
    first = VarShareMethod(replace(options, prior=PriorFrom.previous), SPEC, Pretrained(SPEC.plain().state_dict()))
    for method in (VarShareMethod(options, SPEC, pretrained_from(trained_agent(3), 3)), first):
        network = method.begin(method.tasks)
        disturb(network)
        expected = expected_kl(network, lambda path: [(torch.zeros(()), torch.tensor(0.4))] * 2)
        torch.testing.assert_close(method.penalty(network, 1), expected, rtol=1e-4, atol=1e-3)


def test_the_standard_prior_in_units_of_theta_is_small_beside_it() -> None:
    """Residuals drawn from it have ``prior_scale`` times the standard deviation of a fresh layer's weights."""
    options = replace(VARSHARE, prior=PriorFrom.standard, prior_scale=0.1)
    network = VarShareMethod(options, SPEC, Pretrained(SPEC.plain().state_dict())).begin(1)
    for _, layer in stochastic_layers(network):
        entries = layer.scale * layer.prior_scale.square() * layer.rank**0.5
        torch.testing.assert_close(entries, torch.tensor([0.1 / (3 * layer.in_features) ** 0.5]), rtol=1e-5, atol=0)


def test_a_pooled_prior_matches_moments_over_all_posteriors() -> None:
    """Tasks whose factors agree up to small changes, so that turning them to agree does little; then one turned."""
    base, generator = SPEC.plain().state_dict(), torch.Generator().manual_seed(1)
    first = {
        path: LowRank(torch.randn(1, layer.in_features), torch.randn(layer.out_features, 1))
        for path, layer in linear_layers(SPEC.plain()).items()
    }

    def noisy(value: Tensor, amount: float) -> Tensor:
        return value + amount * torch.randn(value.shape, generator=generator)

    adapters = tuple(
        {path: LowRank(noisy(own.a, 0.05), noisy(own.b, 0.05)) for path, own in first.items()} for _ in range(3)
    )
    sigmas = tuple(
        {path: (noisy(own.a, 1.0).abs() + 0.1, noisy(own.b, 1.0).abs() + 0.1) for path, own in first.items()}
        for _ in range(3)
    )
    flipped = {path: LowRank(-own.a, -own.b) for path, own in adapters[1].items()}  # the same correction
    for given in (adapters, (adapters[0], flipped, adapters[2])):
        options = replace(VARSHARE, rank=1, prior=PriorFrom.pooled)
        method = VarShareMethod(options, SPEC, Pretrained(base, given, sigmas))
        network = method.begin(3)
        layer = network.get_submodule("layers.1")
        assert isinstance(layer, VarShareLoRALayer)
        for index, name in enumerate(("a", "b")):
            mus = torch.stack([getattr(own["layers.1"], name) for own in adapters])
            stds = torch.stack([own["layers.1"][index] for own in sigmas])
            mean = mus.mean(0)
            sigma = (stds.square() + (mus - mean).square()).mean(0).sqrt()
            mu, rho = layer.posteriors()[index]
            factor = "AB"[index]
            found = layer.get_buffer(f"prior_mean_of_mus_{factor}"), layer.get_buffer(f"prior_std_of_mus_{factor}")
            sign = torch.sign((found[0] * mean).sum())
            torch.testing.assert_close(found[0] * sign, mean)
            torch.testing.assert_close(found[1], sigma)
            torch.testing.assert_close(mu[0].detach(), found[0])  # where it starts
            torch.testing.assert_close(F.softplus(rho[0]).detach(), stds.square().mean(0).sqrt())


def test_factors_of_another_scale_are_the_same_prior() -> None:
    agent = trained_agent(2, VarShareLoRAConfig(rank=RANK, alpha=6.0))
    pretrained = pretrained_from(agent, 2)
    method = VarShareMethod(replace(VARSHARE, alpha=1.0), SPEC, pretrained)
    network = method.begin(2).eval()
    std_b = pretrained.sigmas[1]["layers.1"][1] * 6.0  # scales of 3 and of 1/2
    torch.testing.assert_close(network.get_buffer("layers.1.prior_std_of_mus_B"), std_b)
    assert float(total_kl(network, 1).detach()) == pytest.approx(0.0, abs=1e-3)
    torch.testing.assert_close(network(inputs(), IDS), agent.eval()(inputs(), IDS + 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_starts_of_posteriors() -> None:
    pretrained = pretrained_from(trained_agent(3), 3)

    def started(start: PosteriorStart, similar: int | None = None, pretrained: Pretrained = pretrained) -> Tensor:
        method = VarShareMethod(replace(VARSHARE, start=start), SPEC, pretrained)
        found: Tensor = method.begin(3, similar).eval()(inputs(), IDS)
        return found

    method = VarShareMethod(VARSHARE, SPEC, pretrained)
    plain = method.base.network()(inputs(), IDS)
    assert torch.equal(started(PosteriorStart.fresh), plain)
    assert torch.equal(started(PosteriorStart.similar), plain)
    assert torch.equal(started(PosteriorStart.similar, 1), outputs(method, 1))
    assert torch.equal(started(PosteriorStart.prior, 1), outputs(method, 2))
    layer = VarShareMethod(replace(VARSHARE, start=PosteriorStart.similar), SPEC, pretrained).begin(3, 0)
    stds = F.softplus(layer.get_parameter("layers.0.rhos_B"))[0]
    torch.testing.assert_close(stds, pretrained.sigmas[0]["layers.0"][1])
    points = Pretrained(pretrained.base, pretrained.adapters)  # of an agent without posteriors
    assert torch.equal(started(PosteriorStart.prior, pretrained=points), outputs(method, 2))


def test_another_rank_is_refused_where_factors_are_compared() -> None:
    pretrained = pretrained_from(trained_agent(2), 2)
    with pytest.raises(UserError, match=r"method.rank is 3, and .* rank 2; give method.rank=2"):
        VarShareMethod(replace(VARSHARE, rank=3), SPEC, pretrained)
    VarShareMethod(replace(VARSHARE, rank=3, prior=PriorFrom.standard), SPEC, pretrained).begin(2)


def test_the_mean_of_the_posterior_is_what_acts() -> None:
    method = VarShareMethod(VARSHARE, SPEC, pretrained_from(trained_agent(2), 2))
    network = method.begin(2)
    with torch.no_grad():
        assert not torch.equal(network(inputs(), IDS), network(inputs(), IDS))  # it draws in training
        method.end(network, inputs())
        assert torch.equal(network.eval()(inputs(), IDS), outputs(method, 2))


def test_variational_coefficients_pay_once() -> None:
    options = replace(SHARE, learn=Learn.coefficients, variational=True, kl_weight=0.2)
    method = ShareMethod(options, SPEC, pretrained_from(trained_agent(3), 3))
    network = method.begin(3)
    layers = [layer for layer in network.modules() if isinstance(layer, GaussianCoefficients)]
    assert len(layers) == 3
    assert method.penalty(network, 40) == total_kl(network, 1) * (0.2 / 40)
    assert float(total_kl(network, 1).detach()) == float(sum(layer.kl() for layer in layers).detach())  # type: ignore[union-attr]
    assert Elbo(ElboConfig(kl_weight=1.0), 1).penalty(network, 40) == 0.0
    learn(method, 3, 5)
    assert method.share is not None
    own = method.share.layers["layers.0"].coefficients[3]  # type: ignore[union-attr]
    assert own.std_B is not None  # type: ignore[union-attr]
