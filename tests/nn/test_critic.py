from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from varshare_rl.nn import IndependentConfig, Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn.config import Blocks
from varshare_rl.nn.critic import Critic, CriticConfig, TwinQ, ValueLoss, ValueNetwork
from varshare_rl.nn.parameters import count_parameters

TASKS, BATCH, OBS, ACTION = 3, 20, 5, 2
IDS = torch.arange(TASKS)
SCALES = torch.tensor([[1.0], [100.0], [10_000.0]], dtype=torch.float64)


def networks(options: CriticConfig, inputs: int) -> nn.Module:
    return VarShareLoRAConfig(hidden=[8]).build(inputs, options.outputs, TASKS, Posterior(temperature=0.0))


def value_network(**options: object) -> ValueNetwork:
    chosen = CriticConfig(**options)  # type: ignore[arg-type]
    return ValueNetwork(networks(chosen, OBS), TASKS, chosen)


def twins(**options: object) -> TwinQ:
    chosen = CriticConfig(**options)  # type: ignore[arg-type]
    return TwinQ(lambda: networks(chosen, OBS + ACTION), TASKS, chosen)


def values(critic: Critic, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(3)
    obs, action = torch.randn(TASKS, BATCH, OBS, dtype=dtype), torch.randn(TASKS, BATCH, ACTION, dtype=dtype)
    with torch.no_grad():
        return critic(obs, IDS) if isinstance(critic, ValueNetwork) else critic(obs, action, IDS)  # type: ignore[no-any-return]


def targets(step: int) -> Tensor:
    """Targets whose mean and standard deviation move a lot."""
    return SCALES * (torch.randn(TASKS, 64, dtype=torch.float64) * (1 + step) + 3 * step)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("make", [value_network, twins])
def test_values_stay_when_statistics_move(make: type[Critic], dtype: torch.dtype, tolerance: float) -> None:
    """Of the trained critic and of a target critic whose own scales and offsets have moved apart from it."""
    critic: Critic = make(popart=True, popart_rate=0.2)
    critic = critic.double() if dtype is torch.float64 else critic
    target = critic.target()
    critic.track(targets(0), target)  # the first batch sets the units
    with torch.no_grad():
        for module in (critic, target):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for step in range(1, 6):
        before = [values(module, dtype) for module in (critic, target)]
        value_std, mean = critic.value_std().clone(), critic.statistics.mean.clone()  # type: ignore[union-attr]
        critic.track(targets(step), target)
        assert ((critic.value_std() / value_std - 1).abs() > 0.02).all()
        assert ((critic.statistics.mean - mean).abs() > 0.02 * value_std[:, 0]).all()  # type: ignore[union-attr]
        for module, old in zip((critic, target), before, strict=True):
            scale = torch.maximum(old.abs().amax(-1, keepdim=True), critic.value_std().to(dtype))
            assert ((values(module, dtype) - old).abs() / scale).max() <= tolerance


def test_they_would_not_without_the_compensation() -> None:
    """Guards the test above."""
    critic = value_network(popart=True, popart_rate=0.2)
    critic.track(targets(0))
    before = values(critic, torch.float32)
    assert critic.statistics is not None
    critic.statistics.update(targets(3))
    assert ((values(critic, torch.float32) - before).abs().amax(1) > 0.1 * SCALES[:, 0]).all()


def test_targets_share_the_statistics_and_are_not_trained() -> None:
    critic = twins(popart=True)
    target = critic.target()
    critic.track(targets(2), target)
    assert target.statistics is critic.statistics
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert not target.training
    assert all(parameter.requires_grad for parameter in critic.parameters())
    names = [name for name, _ in critic.named_parameters()]
    assert names == [name for name, _ in target.named_parameters()]
    assert sum("affine" in name for name in names) == 4  # a scale and an offset for each of the twins


def test_losses_are_in_the_units_of_the_task() -> None:
    """The same task at three scales has one loss and one gradient."""
    options = CriticConfig(popart=True)
    critic = ValueNetwork(SharedConfig(hidden=[8]).build(OBS, 1, TASKS, Posterior()), TASKS, options).double()
    obs = torch.randn(1, BATCH, OBS, dtype=torch.float64).expand(TASKS, BATCH, OBS)
    with torch.no_grad():
        critic.network.layers[0].theta[:, OBS:] = 0.0  # type: ignore[index, union-attr]  # blind to the task
    target = SCALES * torch.randn(1, BATCH, dtype=torch.float64)
    critic.track(target)
    losses = critic.loss(obs, IDS, target)
    torch.testing.assert_close(losses, losses[:1].expand(TASKS))
    normal = (target - target.mean(1, keepdim=True)) / target.std(1, correction=0, keepdim=True)
    h = critic.network(obs, IDS).squeeze(-1)
    torch.testing.assert_close(losses, 0.5 * (h - normal).square().mean(1))
    losses.sum().backward()
    grad = critic.heads[0].affine.scale.grad  # type: ignore[union-attr]
    torch.testing.assert_close(grad, grad[:1].expand(TASKS))
    torch.testing.assert_close(critic(obs, IDS)[2], h[2] * target[2].std(correction=0) + target[2].mean())


def test_without_options_a_critic_is_its_network_and_the_squared_error() -> None:
    critic = value_network()
    obs, target = torch.randn(TASKS, BATCH, OBS), torch.randn(TASKS, BATCH)
    plain = critic.network(obs, IDS).squeeze(-1)
    assert torch.equal(critic(obs, IDS), plain)
    assert torch.equal(critic.loss(obs, IDS, target), 0.5 * (plain - target).square().mean(-1))
    assert all(name.startswith("network.") for name in critic.state_dict())
    assert critic.value_std().tolist() == [[1.0]]
    pair = twins()
    action = torch.randn(TASKS, BATCH, ACTION)
    loss, q = pair.loss(obs, action, IDS, target)
    assert torch.equal(q, pair(obs, action, IDS))
    torch.testing.assert_close(loss, 0.5 * (q - target).square().mean(-1).sum(0))


@pytest.mark.parametrize("popart", [False, True])
def test_a_categorical_critic_learns_its_targets(popart: bool) -> None:
    """In units of the return within the support, or of any size with PopArt."""
    critic = value_network(loss=ValueLoss.categorical, bins=41, value_min=-5.0, value_max=5.0, popart=popart)
    obs = torch.randn(TASKS, BATCH, OBS)
    target = obs[..., 0].tanh() * (SCALES if popart else 1.0).float() if popart else obs[..., 0].tanh()
    critic.track(target)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    first = critic.loss(obs, IDS, target).detach()
    assert first.shape == (TASKS,)
    assert critic(obs, IDS).shape == (TASKS, BATCH)
    for _ in range(300):
        optimizer.zero_grad()
        critic.loss(obs, IDS, target).sum().backward()
        optimizer.step()
    with torch.no_grad():
        error = (critic(obs, IDS) - target).square().mean(1).sqrt() / critic.value_std()[:, 0]
    assert (error < 0.2).all(), error
    assert (critic.loss(obs, IDS, target) < first - 0.5).all()


def test_renewed_critics_keep_the_statistics_only() -> None:
    critic, fresh = twins(popart=True, popart_rate=0.5), twins(popart=True, popart_rate=0.5)
    for step in range(3):
        critic.track(targets(step))
    assert critic.statistics is not None
    kept = {name: value.clone() for name, value in critic.statistics.state_dict().items()}
    critic.renew(fresh)
    for name, value in critic.statistics.state_dict().items():
        assert torch.equal(value, kept[name])
    for one, other in zip(critic.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    assert critic.heads[0].affine.scale.tolist() == [1.0] * TASKS  # type: ignore[union-attr]


def test_the_critics_networks_are_the_policys_but_for_what_is_given() -> None:
    network = VarShareLoRAConfig(hidden=[8, 8], layer_norm=True, rank=3)
    assert CriticConfig().architecture(network) == network
    wide = CriticConfig(hidden=[16], layer_norm=False, blocks=Blocks.bronet).architecture(network)
    assert wide == VarShareLoRAConfig(hidden=[16], layer_norm=False, blocks=Blocks.bronet, rank=3)
    assert CriticConfig(activation="elu").architecture(network) == replace(network, activation="elu")
    assert network == VarShareLoRAConfig(hidden=[8, 8], layer_norm=True, rank=3)


def test_scales_and_offsets_are_counted_as_per_task() -> None:
    plain, popart = (
        ValueNetwork(
            IndependentConfig(hidden=[8]).build(OBS, 1, TASKS, Posterior()), TASKS, CriticConfig(popart=on)
        )
        for on in (False, True)
    )
    one, other = count_parameters([plain], TASKS), count_parameters([popart], TASKS)
    assert other.per_task == one.per_task + 2
    assert other.shared == one.shared
