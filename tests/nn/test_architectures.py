"""One table of architectures against one list of invariants. A new architecture is one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import hold_noise
from naive import scramble
from naive_networks import naive_network
from torch import Tensor, nn

from varshare_rl.nn import (
    CAREConfig,
    FiLMConfig,
    IndependentConfig,
    L2SoftConfig,
    LoRAConfig,
    MOOREConfig,
    MultiHeadConfig,
    NetworkConfig,
    PaCoConfig,
    Posterior,
    SharedConfig,
    SoftModularizationConfig,
    TaskEmbeddingConfig,
    VarShareConfig,
    VarShareLoRAConfig,
)
from varshare_rl.nn.config import Blocks, Initialization
from varshare_rl.nn.initialization import initialize
from varshare_rl.nn.layer import TaskLayer, penalized_layers
from varshare_rl.nn.mlp import ACTIVATIONS, StackedLinear
from varshare_rl.nn.parameters import ParameterCount, count_parameters, total_kl
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.nn.variational import ESTIMATORS, stochastic_layers
from varshare_rl.optim.task_subset import TaskSubset

IN, OUT, TASKS, BATCH = 5, 3, 4, 6


@dataclass(frozen=True)
class Case:
    """An architecture with hidden layers of 7 and 6, and what is true of it."""

    make: Callable[[], NetworkConfig]
    stochastic: bool
    count: ParameterCount  # by hand
    penalized: bool = False  # without noise
    starts_shared: bool = False  # a fresh network treats all tasks alike

    @property
    def charged(self) -> bool:
        """Tasks pay for departing from what is shared."""
        return self.stochastic or self.penalized


# Layers 5 -> 7 -> 6 -> 3: weights 35 + 42 + 18 = 95, biases 7 + 6 + 3 = 16, together 111.
CASES = {
    # one-hot: 4 more columns of 7
    "shared": Case(lambda: SharedConfig(hidden=[7, 6]), False, ParameterCount(139, 139, 139, 0)),
    "independent": Case(lambda: IndependentConfig(hidden=[7, 6]), False, ParameterCount(444, 111, 0, 111)),
    # norms of 2 * (7 + 6)
    "independent_layer_norm": Case(
        lambda: IndependentConfig(hidden=[7, 6], layer_norm=True), False, ParameterCount(548, 137, 0, 137)
    ),
    # layers 5 -> 7 -> 7 -> 7 -> 3: weights 154, biases 24, norms 42
    "independent_bronet": Case(
        lambda: IndependentConfig(hidden=[7, 7], blocks=Blocks.bronet), False, ParameterCount(880, 220, 0, 220)
    ),
    # mus and rhos of 95 weights each
    "varshare": Case(
        lambda: VarShareConfig(hidden=[7, 6]),
        True,
        ParameterCount(111 + 4 * 190, 111 + 95, 111, 190),
        starts_shared=True,
    ),
    # rank 2: factors of 2 * (5 + 7) + 2 * (7 + 6) + 2 * (6 + 3) = 68
    "varshare_lora": Case(
        lambda: VarShareLoRAConfig(hidden=[7, 6], rank=2, alpha=3.0),
        True,
        ParameterCount(111 + 4 * 136, 111 + 68, 111, 136),
        starts_shared=True,
    ),
    # an embedding of 2: two more columns of 7
    "task_embedding": Case(
        lambda: TaskEmbeddingConfig(hidden=[7, 6], embedding=2), False, ParameterCount(125 + 4 * 2, 125 + 2, 125, 2)
    ),
    # trunk 42 + 48, head 21
    "multi_head": Case(lambda: MultiHeadConfig(hidden=[7, 6]), False, ParameterCount(90 + 4 * 21, 111, 90, 21)),
    # features 5 -> 4 -> 4: 24 + 20; modules 4 -> 7 -> 6, two each: 2 * (35 + 48); routes 4 -> 4 and 4 -> 2:
    # 20 + 10; condition 4 -> 4: 20; head 21; per task an embedding of 4
    "soft_modularization": Case(
        lambda: SoftModularizationConfig(hidden=[7, 6], modules=2, embedding=4),
        False,
        ParameterCount(281 + 4 * 4, 281 + 4, 281, 4),
    ),
    "paco": Case(
        lambda: PaCoConfig(hidden=[7, 6], parameter_sets=3), False, ParameterCount(333 + 4 * 3, 333 + 3, 333, 3)
    ),
    # two experts 5 -> 7 -> 6 of 90; per task a mixture of 2 and a head of 21
    "moore": Case(
        lambda: MOOREConfig(hidden=[7, 6], experts=2), False, ParameterCount(180 + 4 * 23, 180 + 23, 180, 23)
    ),
    "moore_single_head": Case(
        lambda: MOOREConfig(hidden=[7, 6], experts=3, multi_head=False),
        False,
        ParameterCount(291 + 4 * 3, 291 + 3, 291, 3),
    ),
    # two encoders 5 -> 4 -> 4 of 44; context 3 -> 3 -> 3: 24; attention 3 -> 3 -> 2: 12 + 8; trunk
    # 7 -> 7 -> 6 -> 3: 56 + 48 + 21; per task an embedding of 3
    "care": Case(
        lambda: CAREConfig(hidden=[7, 6], experts=2, encoder_width=4, context=3),
        False,
        ParameterCount(257 + 4 * 3, 257 + 3, 257, 3),
    ),
    # scales and shifts of 7 + 6
    "film": Case(
        lambda: FiLMConfig(hidden=[7, 6]),
        False,
        ParameterCount(111 + 4 * 26, 111 + 26, 111, 26),
        starts_shared=True,
    ),
    "lora": Case(
        lambda: LoRAConfig(hidden=[7, 6], rank=2, alpha=3.0),
        False,
        ParameterCount(111 + 4 * 68, 111 + 68, 111, 68),
        starts_shared=True,
    ),
    "l2_soft": Case(
        lambda: L2SoftConfig(hidden=[7, 6], rank=2, alpha=3.0),
        False,
        ParameterCount(111 + 4 * 68, 111 + 68, 111, 68),
        penalized=True,
        starts_shared=True,
    ),
    "l2_soft_full_rank": Case(
        lambda: L2SoftConfig(hidden=[7, 6], rank=None),
        False,
        ParameterCount(111 + 4 * 95, 111 + 95, 111, 95),
        penalized=True,
        starts_shared=True,
    ),
}
STOCHASTIC = [name for name, case in CASES.items() if case.stochastic]


def build(name: str, tasks: int = TASKS, **posterior: float) -> nn.Module:
    return CASES[name].make().build(IN, OUT, tasks, Posterior(**posterior))  # type: ignore[arg-type]


def scrambled(name: str, layer_norm: bool = False) -> nn.Module:
    options = CASES[name].make()
    options.layer_norm |= layer_norm
    network = options.build(IN, OUT, TASKS, Posterior()).double()
    scramble(network)
    hold_noise(network)
    return network


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def network(name: str) -> nn.Module:
    return scrambled(name)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(TASKS, BATCH, IN, dtype=torch.float64), torch.arange(TASKS)


def own_parameters(network: nn.Module) -> dict[str, Tensor]:
    """The stacked per-task parameters by dotted name."""
    return {
        f"{prefix}.{name}".lstrip("."): layer.get_parameter(name)
        for prefix, layer in network.named_modules()
        for name in getattr(layer, "per_task_parameters", ())
    }


@pytest.mark.parametrize("training", [True, False])
def test_batched_equals_one_task_at_a_time(network: nn.Module, training: bool) -> None:
    network.train(training)
    x, ids = inputs()
    together = network(x, ids)
    assert together.shape == (TASKS, BATCH, OUT)
    alone = torch.stack([network(x[task], task) for task in range(TASKS)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    flat = network(x.flatten(0, 1), ids.repeat_interleave(BATCH))
    torch.testing.assert_close(together, flat.view_as(together), rtol=1e-12, atol=1e-12)


def test_the_last_layer_of_the_initial_values_makes_the_outputs(name: str) -> None:
    """Without a gain there is no output, and no other layer is without one."""
    config = replace(CASES[name].make(), output_gain=0.0)
    network = config.build(IN, OUT, TASKS, Posterior())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    initialize(network, config)
    x, ids = inputs()
    network.double()
    with posterior_mean(network):
        if config.name != "l2_soft":  # its residuals do not start at 0
            assert not network(x, ids).any()
    assert 1 <= sum(not torch.equal(value, before[key]) for key, value in network.float().state_dict().items()) <= 2


def test_orthogonal_weights_are_those_of_every_task_and_copy(name: str) -> None:
    config = replace(CASES[name].make(), initialization=Initialization.orthogonal, output_gain=0.01)
    network = config.build(IN, OUT, TASKS, Posterior())
    initialize(network, config)
    layers = [layer for layer in network.modules() if isinstance(layer, TaskLayer | StackedLinear)]
    for layer in layers:
        weight, bias = layer.linear_parameters()
        assert bias is not None
        assert not bias.any()
        gain = 0.01 if layer is layers[-1] else 2**0.5
        for one in weight.detach().view(-1, *weight.shape[-2:]):
            narrow = one if one.shape[0] <= one.shape[1] else one.T
            torch.testing.assert_close(narrow @ narrow.T, gain**2 * torch.eye(len(narrow)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_plain_network_per_task(name: str, training: bool, layer_norm: bool) -> None:
    network = scrambled(name, layer_norm).train(training)
    x, ids = inputs()
    y = network(x, ids)
    for task in range(TASKS):
        torch.testing.assert_close(y[task], naive_network(network, x[task], task), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("layer_norm", [False, True])
def test_every_activation_has_gradients(name: str, activation: str, layer_norm: bool) -> None:
    """Activations may overwrite their argument: nothing else may still need it."""
    options = CASES[name].make()
    options.activation, options.layer_norm = activation, layer_norm
    network = options.build(IN, OUT, TASKS, Posterior())
    x, ids = torch.randn(TASKS, BATCH, IN, requires_grad=True), torch.arange(TASKS)
    before = x.detach().clone()
    network(x, ids).square().sum().backward()
    assert torch.equal(x, before)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_permuting_tasks_permutes_outputs(network: nn.Module, training: bool) -> None:
    network.train(training)
    x, ids = inputs()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(network(x[order], ids[order]), network(x, ids)[order], rtol=1e-12, atol=1e-12)


def test_tasks_differ(network: nn.Module) -> None:
    """Guards the tests above: a network blind to its task would pass most of them."""
    x, ids = inputs()
    y = network.eval()(x[:1].expand_as(x), ids)
    for task in range(1, TASKS):
        assert (y[task] - y[0]).abs().max() > 1e-3


def test_no_gradient_crosses_to_another_task(network: nn.Module) -> None:
    x, ids = inputs()
    for task in range(TASKS):
        network.zero_grad()
        network(x, ids)[task].square().sum().backward()
        for name, parameter in own_parameters(network).items():
            assert parameter.grad is not None
            touched = parameter.grad.flatten(1).abs().sum(1) > 0
            assert touched.tolist() == [index == task for index in range(TASKS)], name


def test_every_parameter_gets_a_gradient(network: nn.Module) -> None:
    x, ids = inputs()
    network(x, ids).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.starts_shared])
def test_fresh_adapters_are_the_shared_network(name: str) -> None:
    network = build(name).eval()
    x, ids = torch.randn(TASKS, BATCH, IN), torch.arange(TASKS)
    plain = SharedConfig(hidden=[7, 6]).build(IN, OUT, TASKS, Posterior())
    with torch.no_grad():
        for ours, theirs in zip(plain.layers, network.layers, strict=True):
            ours.theta.zero_()  # the columns of the one-hot task
            ours.theta[:, : ours.in_features] = theirs.theta
            ours.bias.copy_(theirs.bias)
    torch.testing.assert_close(network(x, ids), plain(x, ids), rtol=0, atol=1e-6)


def test_kl_is_per_task_and_never_negative(name: str, network: nn.Module) -> None:
    kl = total_kl(network, TASKS)
    assert kl.shape == (TASKS,)
    assert (kl > 0).all() if CASES[name].charged else (kl == 0).all()
    layers = [layer.kl() for _, layer in penalized_layers(network)]
    assert len(layers) == (3 if CASES[name].charged else 0)  # heads included
    assert len(list(stochastic_layers(network))) == (3 if CASES[name].stochastic else 0)
    if layers:
        torch.testing.assert_close(kl, layers[0] + layers[1] + layers[2])


def test_kl_is_zero_exactly_at_the_prior(name: str) -> None:
    network = build(name, prior_scale=0.3).double()
    with torch.no_grad():
        for key, parameter in own_parameters(network).items():
            is_rho = key.rsplit(".", 1)[-1].startswith("rho")
            parameter.fill_(float(torch.tensor(0.3).double().expm1().log()) if is_rho else 0.0)
    zeros = torch.zeros(TASKS, dtype=torch.float64)
    torch.testing.assert_close(total_kl(network, TASKS), zeros, rtol=0, atol=1e-12)


def test_state_dict_round_trip(name: str, network: nn.Module) -> None:
    other = build(name).double()
    other.load_state_dict(network.state_dict())
    x, ids = inputs()
    assert torch.equal(other.eval()(x, ids), network.eval()(x, ids))
    assert torch.equal(total_kl(other, TASKS), total_kl(network, TASKS))


def test_parameter_counts_by_hand(name: str) -> None:
    network = build(name)
    count = count_parameters([network], TASKS)
    assert count == CASES[name].count
    assert count.stored == sum(parameter.numel() for parameter in network.parameters())
    assert count.as_dict().keys() == {"stored", "active_per_task", "shared", "per_task"}
    assert count_parameters([network, network], TASKS).stored == 2 * count.stored


def test_active_parameters_are_those_that_one_task_uses(name: str) -> None:
    """Counted by their gradients: of what task 1 is trained on, means without sigmas."""
    network = scrambled(name).eval()
    network(torch.randn(BATCH, IN, dtype=torch.float64), 1).square().sum().backward()
    own = own_parameters(network)
    used = sum(
        parameter[1].numel() if key in own else parameter.numel()
        for key, parameter in network.named_parameters()
        if parameter.grad is not None and not key.rsplit(".", 1)[-1].startswith("rho")
    )
    assert used == CASES[name].count.active_per_task


def test_ids_stay_on_the_cpu_wherever_the_network_is(name: str) -> None:
    """On a device without memory, in all layouts: nothing mixes devices, and nothing waits for a value."""
    network = build(name).to("meta")
    layouts: list[tuple[tuple[int, ...], Tensor | int]] = [
        ((TASKS, BATCH), torch.arange(TASKS)),
        ((2, BATCH), torch.tensor([3, 1])),
        ((5,), torch.tensor([0, 3, 3, 1, 0])),
        ((BATCH,), 2),
    ]
    for shape, ids in layouts:
        y = network(torch.empty(*shape, IN, device="meta"), ids)
        assert y.shape == (*shape, OUT)
        assert y.is_meta


def test_unknown_id_is_an_error_that_names_it(network: nn.Module) -> None:
    x, _ = inputs()
    with pytest.raises(IndexError, match=r"^unknown task id 4: this network has 4 tasks \(0 to 3\)$"):
        network(x, torch.tensor([0, 1, 2, 4]))


def test_one_task_is_the_same_code(name: str) -> None:
    network = build(name, tasks=1).eval()
    x = torch.randn(1, BATCH, IN)
    y = network(x, torch.arange(1))
    assert y.shape == (1, BATCH, OUT)
    torch.testing.assert_close(network(x[0], 0), y[0])
    with pytest.raises(IndexError, match="unknown task id 1: this network has 1 tasks"):
        network(x[0], 1)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_options_reach_the_layers(name: str) -> None:
    network = build(name, prior_scale=0.25, temperature=0.0)
    for layer in network.layers:  # type: ignore[union-attr]
        torch.testing.assert_close(layer.prior_scale, torch.full((TASKS,), 0.25))
    x, ids = torch.randn(TASKS, BATCH, IN), torch.arange(TASKS)
    assert torch.equal(network.train()(x, ids), network.eval()(x, ids))  # temperature 0: no noise
    warm = build(name).train()
    assert not torch.equal(warm(x, ids), warm(x, ids))


@pytest.mark.parametrize("options", [VarShareLoRAConfig, VarShareConfig])
@pytest.mark.parametrize("estimator", [None, *ESTIMATORS])
def test_the_estimator_reaches_the_layers(
    options: type[VarShareLoRAConfig | VarShareConfig], estimator: str | None
) -> None:
    network = options(hidden=[7]).build(IN, OUT, TASKS, Posterior(estimator=estimator, weight_samples=2)).train()
    own = {(layer.estimator, layer.weight_samples) for layer in network.layers}
    assert own == {(estimator or options.default_estimator, 2)}
    x, ids = torch.randn(TASKS, BATCH, IN), torch.arange(TASKS)
    assert torch.equal(network(x, ids), network(x, ids)) == (estimator == "mean")


def test_updates_of_a_few_tasks_have_their_outputs_and_gradients(network: nn.Module) -> None:
    """Rows in the place of stacks change nothing for the tasks whose rows they are."""
    network.eval()
    window = TaskSubset(TASKS, TASKS - 1, [network], [], [])
    x, everything = inputs()

    def gradients(ids: Tensor, losses: Tensor) -> dict[str, Tensor]:
        """Of the sum of the losses of ``ids``."""
        network.zero_grad()
        (network(x[ids], ids).square().mean((1, 2)) + 0.01 * total_kl(network, len(ids)))[losses].sum().backward()
        return {path: p.grad.clone() for path, p in network.named_parameters() if p.grad is not None}

    with torch.no_grad():
        outputs = network(x, everything)
    seen = []
    for _ in range(window.turns):
        with window.turn() as ids:
            assert ids is not None
            seen += ids.tolist()
            torch.testing.assert_close(network(x[ids], ids), outputs[ids], rtol=1e-12, atol=1e-12)
            inside = gradients(ids, torch.arange(len(ids)))
        outside = gradients(everything, ids)
        for path in own_parameters(network):
            outside[path] = outside[path][ids]
        torch.testing.assert_close(inside, outside, rtol=1e-9, atol=1e-12)
    assert sorted(seen) == list(range(TASKS))
