from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from varshare_rl.nn import Posterior, SharedConfig, VarShareConfig, VarShareLoRAConfig
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.nn.weight_sampler import Resample, WeightSampler, drawn_once

TASKS, ENVS, IN, OUT = 2, 3, 4, 2
IDS = torch.arange(TASKS)
NO_END = torch.zeros(TASKS, ENVS, dtype=torch.bool)


def network(name: str = "varshare_lora") -> nn.Module:
    options = {"varshare_lora": VarShareLoRAConfig(hidden=[5], rank=2), "varshare": VarShareConfig(hidden=[5])}
    made = options[name].build(IN, OUT, TASKS, Posterior(estimator="weight"))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "rhos" in key:
                parameter.fill_(-1.0)
            elif "mus" in key:
                parameter.normal_()
    return made


def made(mode: Resample, name: str = "varshare_lora", recorded: bool = True) -> tuple[nn.Module, WeightSampler]:
    module = network(name)
    return module, WeightSampler(mode, module, TASKS, ENVS, recorded)


def act(module: nn.Module, draws: WeightSampler, x: Tensor, turns: int = 1) -> Tensor:
    """One vector step's outputs, acting for the environments in so many turns."""
    outputs = []
    for part in x.tensor_split(turns, dim=1):
        with draws.sample(part.shape[1]):
            outputs.append(module(part, IDS))
    return torch.cat(outputs, dim=1)


def row() -> Tensor:
    """The same input for every environment, so that outputs differ by the weights alone."""
    return torch.randn(IN).expand(TASKS, ENVS, IN)


def distinct(y: Tensor) -> int:
    return len({round(value, 5) for value in y[0, :, 0].tolist()})


@pytest.mark.parametrize("name", ["varshare_lora", "varshare"])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("mode", list(Resample))
def test_a_draw_lasts_as_long_as_its_name_says(mode: Resample, turns: int, name: str) -> None:
    module, draws = made(mode, name)
    x = row()
    first = act(module, draws, x, turns)
    draws.record(NO_END)
    second = act(module, draws, x, turns)
    same_draw = mode is not Resample.per_step
    assert torch.allclose(first, second, atol=1e-6) == same_draw
    assert distinct(first) == (ENVS if mode in (Resample.per_episode, Resample.per_step) else 1)
    ended = NO_END.clone()
    ended[0, 1] = True
    draws.record(ended)
    third = act(module, draws, x, turns)
    changed = ~torch.isclose(second, third, atol=1e-6).all(-1)
    if mode is Resample.per_episode:
        assert torch.equal(changed, ended)
    draws.record(NO_END)
    draws.resample()
    fourth = act(module, draws, x, turns)
    if mode in (Resample.mean, Resample.per_episode):
        torch.testing.assert_close(third, fourth)  # an episode goes on with its draw
    elif mode is Resample.per_update:
        assert not torch.isclose(third, fourth).any()
    assert {layer.noise for _, layer in stochastic_layers(module)} == {None}  # nothing is left behind
    assert module.training


@pytest.mark.parametrize("name", ["varshare_lora", "varshare"])
@pytest.mark.parametrize("mode", list(Resample))
def test_replaying_gives_every_row_the_weights_it_acted_with(mode: Resample, name: str) -> None:
    module, draws = made(mode, name)
    inputs, outputs, kept = [], [], []
    for update in range(2):
        inputs.clear(), outputs.clear(), kept.clear()
        for step in range(5):
            x = torch.randn(TASKS, ENVS, IN)
            outputs.append(act(module, draws, x, 1 + step % 2))
            inputs.append(x)
            done = torch.rand(TASKS, ENVS) < 0.4
            kept.append(draws.record(done))
        rows = torch.randperm(5 * ENVS)[:11]  # a minibatch, shuffled over steps and environments
        batch = torch.stack(inputs, 1).flatten(1, 2)[:, rows]
        expected = torch.stack(outputs, 1).flatten(1, 2)[:, rows]
        replayed = None if kept[0] is None else torch.stack(kept, 1).flatten(1, 2)[:, rows]  # type: ignore[arg-type]
        with draws.replay(replayed):
            torch.testing.assert_close(module(batch, IDS), expected, rtol=1e-5, atol=1e-5)
        if mode is not Resample.mean and update == 0:
            assert not torch.allclose(module(batch, IDS), expected, atol=1e-3)  # guards the line above
        draws.resample()


@pytest.mark.parametrize("mode", list(Resample))
def test_draws_that_are_not_replayed_keep_no_record(mode: Resample) -> None:
    module, draws = made(mode, recorded=False)
    for _ in range(20):
        act(module, draws, row())
        assert draws.record(torch.rand(TASKS, ENVS) < 0.5) is None
    sizes = {len(value) for values in draws.values.values() for value in values}
    assert sizes <= {TASKS, TASKS * ENVS}
    assert draws.bytes_per_step() == 0


@pytest.mark.parametrize("mode", list(Resample))
def test_state_round_trip_in_the_middle_of_episodes(mode: Resample) -> None:
    module, one = made(mode)
    for _ in range(3):
        act(module, one, row())
        one.record(torch.rand(TASKS, ENVS) < 0.5)
    other = WeightSampler(mode, module, TASKS, ENVS, recorded=True)
    other.load_state(one.state())
    x = row()
    random = torch.get_rng_state()
    expected = act(module, one, x)
    torch.set_rng_state(random)
    assert torch.equal(act(module, other, x), expected)


def test_a_network_without_posteriors_acts_as_it_is() -> None:
    module = SharedConfig(hidden=[5]).build(IN, OUT, TASKS, Posterior())
    for mode in Resample:
        draws = WeightSampler(mode, module, TASKS, ENVS, recorded=True)
        x = row()
        assert torch.equal(act(module, draws, x), module(x, IDS))
        assert draws.record(NO_END) is None
        with draws.replay(None):
            assert torch.equal(module(x, IDS), module(x, IDS))


def test_bytes_per_step_are_those_that_are_kept() -> None:
    for mode in Resample:
        module, draws = made(mode)
        act(module, draws, row())
        kept = draws.record(NO_END)
        size = 0 if kept is None else kept[0, 0].numel() * kept.element_size()
        assert draws.bytes_per_step() == size


@pytest.mark.parametrize("name", ["varshare_lora", "varshare"])
def test_drawn_once_is_one_draw_for_all_passes_inside(name: str) -> None:
    module, x = network(name), torch.randn(TASKS, 4, IN)
    with drawn_once(module):
        one, same = module(x, IDS), module(x, IDS)
    with drawn_once(module):
        other = module(x, IDS)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(module(x, IDS), module(x, IDS))  # and outside every pass has its own again


def test_drawn_once_leaves_held_noise_and_other_estimators_alone() -> None:
    module, draws = made(Resample.per_update)
    x = torch.randn(TASKS, ENVS, IN)
    with draws.sample(ENVS):
        held = module(x, IDS)
        with drawn_once(module):
            assert torch.equal(module(x, IDS), held)
        assert torch.equal(module(x, IDS), held)
    local = VarShareLoRAConfig(hidden=[5], rank=2).build(IN, OUT, TASKS, Posterior(estimator="local"))
    with drawn_once(local):
        assert not torch.equal(local(x, IDS), local(x, IDS))
