"""Layers on a frozen basis: against a loop that builds every weight, and learning in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from share_reference import adapters
from torch import Tensor, nn

from varshare_rl.adapters import Adapter, LowRank
from varshare_rl.errors import UserError
from varshare_rl.nn import Posterior, VarShareLoRAConfig
from varshare_rl.nn.parameters import count_parameters, total_kl
from varshare_rl.nn.stochastic import WeightNoise
from varshare_rl.transfer.share import (
    Coefficients,
    LearnConfig,
    Share,
    ShareConfig,
    ShareLinear,
    SizeConfig,
    attach,
    consolidate,
    fine_tune,
    merge,
    put_coefficients,
    share_layers,
    take_adapter,
    take_coefficients,
    trained_parameters,
    using_tasks,
)
from varshare_rl.transfer.share.coefficients import GaussianCoefficients, PointCoefficients
from varshare_rl.transfer.share.posterior import Gaussian, plain_prior

TASKS, IN, OUT, K, P = 5, 7, 6, 4, 2

LAYOUTS: dict[str, tuple[tuple[int, ...], list[int] | int]] = {
    "all_tasks": ((TASKS, 3, IN), [0, 1, 2, 3, 4]),
    "permuted": ((TASKS, 3, IN), [3, 0, 4, 2, 1]),
    "subset": ((2, 3, IN), [4, 1]),
    "repeated": ((4, 3, IN), [2, 2, 0, 2]),
    "one_id": ((6, IN), 3),
    "one_id_any_shape": ((2, 3, 4, IN), 1),
    "flat": ((8, IN), [0, 4, 4, 1, 0, 3, 4, 2]),
}
KINDS = ["points", "posterior", "temporary"]


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns))[0]


def layer_of(kind: str, dtype: torch.dtype = torch.float64) -> ShareLinear:
    coefficients: PointCoefficients | GaussianCoefficients = PointCoefficients(TASKS, K, K, P)
    if kind == "posterior":
        coefficients = GaussianCoefficients(TASKS, plain_prior(K, K, P, 1.0))
    layer = ShareLinear(
        torch.randn(OUT, IN), torch.randn(OUT), orthonormal(OUT, K), orthonormal(IN, K), coefficients
    )
    if kind == "temporary":
        layer.learn_temporarily(2, phi=2, p=3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 - (1.0 if "rho" in name else 0.0))
    return layer.to(dtype)


def weight_of(layer: ShareLinear, task: int) -> Tensor:
    own = layer.coefficients
    if isinstance(own, PointCoefficients):
        eps_B, eps_A = own.eps_B[task], own.eps_A[task]
    else:
        eps_B, eps_A = own.mus_B[task], own.mus_A[task]
        if own.training:
            assert own.noise is not None
            eps_B = eps_B + F.softplus(own.rhos_B[task]) * own.noise.values[0][task]
            eps_A = eps_A + F.softplus(own.rhos_A[task]) * own.noise.values[1][task]
    weight = layer.theta + layer.basis_B @ eps_B @ (layer.basis_A @ eps_A).t()
    if layer.temporary is not None and layer.temporary_task == task:
        new = layer.temporary
        weight = weight + new.directions_B @ new.eps_B @ (new.directions_A @ new.eps_A).t()
    return weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_loop_over_rows(kind: str, layout: str, training: bool) -> None:
    layer = layer_of(kind).train(training)
    if isinstance(layer.coefficients, GaussianCoefficients):
        layer.coefficients.noise = WeightNoise(layer.coefficients.draw_noise(TASKS))
    shape, ids = LAYOUTS[layout]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if isinstance(ids, int):
        expected = F.linear(x, weight_of(layer, ids), layer.bias)
    else:
        expected = torch.stack(
            [F.linear(row, weight_of(layer, task), layer.bias) for row, task in zip(x, ids, strict=True)]
        )
    given: Tensor | int = ids if isinstance(ids, int) else torch.tensor(ids)
    y = layer(x, given)
    torch.testing.assert_close(y, expected)
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    direction = torch.randn_like(y)
    ours, naive = (
        torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True, materialize_grads=True)
        for out in (y, expected)
    )
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, theirs)
    with using_tasks(layer, given):
        torch.testing.assert_close(layer(x), y)
    assert layer.task_ids is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    layer = layer_of(kind)
    if isinstance(layer.coefficients, GaussianCoefficients):
        layer.coefficients.noise = WeightNoise(layer.coefficients.draw_noise(TASKS))
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (x, torch.tensor([2, 0, 4]))
        )

    values = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (x, *values))


def test_only_coefficients_are_trained() -> None:
    assert {name for name, _ in layer_of("points").named_parameters()} == {
        "coefficients.eps_B",
        "coefficients.eps_A",
    }
    layer = layer_of("temporary")
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {f"temporary.{name}" for name in ("directions_B", "directions_A", "eps_B", "eps_A")}
    count = count_parameters([layer_of("points")], TASKS)
    assert (count.shared, count.per_task) == (0, 2 * K * P)
    count = count_parameters([layer_of("posterior")], TASKS)
    assert (count.shared, count.per_task, count.active_per_task) == (0, 4 * K * P, 2 * K * P)


def test_a_fresh_task_is_the_base_and_moves() -> None:
    """``eps_B = 0`` makes the correction 0; were ``eps_A`` 0 too, no gradient would ever leave that point."""
    for prior in (
        None,
        plain_prior(K, K, P, 1.0),
        Gaussian(*(torch.full((K, P), value) for value in (0.0, 1e-3) * 2)),
    ):
        own = PointCoefficients(1, K, K, P) if prior is None else GaussianCoefficients(1, prior)
        layer = ShareLinear(torch.randn(OUT, IN), None, orthonormal(OUT, K), orthonormal(IN, K), own).eval()
        x = torch.randn(9, IN)
        torch.testing.assert_close(layer(x, 0), F.linear(x, layer.theta))
        layer(x, 0).square().sum().backward()
        moved = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        assert max(float(grad.abs().max()) for grad in moved) > 1e-4


def test_layers_say_what_is_missing() -> None:
    layer = layer_of("points")
    with pytest.raises(ValueError, match="using_tasks"):
        layer(torch.randn(3, IN).double())
    with pytest.raises(IndexError, match="unknown task id 5"):
        layer(torch.randn(3, IN).double(), 5)


def test_tasks_are_added_without_touching_the_others() -> None:
    for kind in ("points", "posterior"):
        layer = layer_of(kind).eval()
        x = torch.randn(TASKS, 3, IN).double()
        before = layer(x, torch.arange(TASKS))
        assert layer.coefficients.add_tasks(2) == range(5, 7)
        torch.testing.assert_close(layer(x, torch.arange(TASKS)), before, rtol=0, atol=0)
        torch.testing.assert_close(layer(x[0], 6), F.linear(x[0], layer.theta, layer.bias))


def test_coefficients_come_out_as_they_went_in() -> None:
    own = Coefficients(torch.randn(K, 1), torch.randn(K, 1), torch.rand(K, 1), torch.rand(K, 1))
    for kind in ("points", "posterior"):
        layer = layer_of(kind, torch.float32)
        layer.coefficients.put(3, own)
        back = layer.coefficients.take(3)
        torch.testing.assert_close(back.eps_B[:, :1], own.eps_B)
        torch.testing.assert_close(back.eps_A[:, :1], own.eps_A)
        assert float(back.eps_B[:, 1:].abs().max()) == 0.0
        if kind == "posterior":
            assert back.std_B is not None
            assert own.std_B is not None
            torch.testing.assert_close(back.std_B[:, :1], own.std_B)
        else:
            assert back.std_B is None


# Whole models


class Attention(nn.Module):
    """A model of someone else's, which knows nothing of tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q_proj(x)) * self.v_proj(x)


def for_attention(count: int = 4, seed: int = 0) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(seed)

    def factors() -> LowRank:
        return LowRank(torch.randn(2, 12, generator=generator), torch.randn(8, 2, generator=generator) * 0.2)

    return {f"task{i}": {"block.q_proj": factors(), "block.v_proj": factors()} for i in range(count)}


def model() -> nn.Module:
    whole = nn.Module()
    whole.block = Attention()
    whole.forward = lambda x: whole.block(x)  # type: ignore[method-assign,assignment]
    return whole


def with_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with an adapter added to its weights."""
    with torch.no_grad():
        for name, factors in adapter.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight += factors.delta()
    return model


@pytest.fixture
def share() -> Share:
    return consolidate(for_attention(), ShareConfig(k=SizeConfig(fixed=6)))


def copy_of(source: nn.Module) -> nn.Module:
    made = model()
    made.load_state_dict(source.state_dict())
    return made


def test_a_model_computes_what_the_rebuilt_adapters_give(share: Share) -> None:
    base, x = model(), torch.randn(3, 5, 12)
    shared = copy_of(base)
    attach(shared, share, LearnConfig(), tasks=("task2", "task0", "task3"))
    for task_id, task in enumerate(("task2", "task0", "task3")):
        expected = with_adapter(copy_of(base), share.rebuild(task))(x)
        with using_tasks(shared, task_id):
            torch.testing.assert_close(shared(x), expected)
    with using_tasks(shared, torch.tensor([1, 1, 0])):  # every sequence with its own task
        mixed = shared(x)
    torch.testing.assert_close(mixed[2], with_adapter(copy_of(base), share.rebuild("task2"))(x)[2])


def test_the_projects_own_networks(share: Share) -> None:
    network = VarShareLoRAConfig(hidden=[8], rank=2).build(12, 6, 3, Posterior()).eval()
    generator = torch.Generator().manual_seed(0)
    sizes = {"layers.0": (8, 12), "layers.1": (6, 8)}
    given: dict[str, Adapter] = {
        f"task{i}": {
            name: LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator))
            for name, (out, into) in sizes.items()
        }
        for i in range(3)
    }
    x = torch.randn(3, 4, 12)
    theta = [layer.theta.clone() for layer in network.layers]  # type: ignore[union-attr,operator]
    basis = consolidate(given, ShareConfig(k=SizeConfig(max_error=0.0)))
    attach(network, basis, LearnConfig(), tasks=basis.tasks)
    y = network(x, torch.arange(3))
    for index, adapter in enumerate(given.values()):
        hidden = torch.tanh(F.linear(x[index], theta[0] + adapter["layers.0"].delta(), network.layers[0].bias))  # type: ignore[arg-type,union-attr]
        expected = F.linear(hidden, theta[1] + adapter["layers.1"].delta(), network.layers[1].bias)  # type: ignore[arg-type,union-attr]
        torch.testing.assert_close(y[index], expected, atol=1e-4, rtol=1e-4)


def teacher(base: nn.Module, x: Tensor, adapter: Adapter) -> Callable[[nn.Module], Tensor]:
    target = with_adapter(copy_of(base), adapter)(x).detach()

    def loss(student: nn.Module) -> Tensor:
        with using_tasks(student, 0):
            return F.mse_loss(student(x), target)

    return loss


def test_a_task_is_learnt_by_coefficients_alone(share: Share) -> None:
    base, x = model(), torch.randn(64, 12)
    loss = teacher(base, x, share.rebuild("task1"))  # a task that the basis can express
    student = copy_of(base)
    attach(student, share, LearnConfig(p=None), fresh=1)
    frozen = {name: value.clone() for name, value in student.state_dict().items() if "eps" not in name}
    losses = fine_tune(student, lambda: loss(student), updates=300)
    assert losses[-1] < 0.02 * losses[0]
    assert all(torch.equal(student.state_dict()[name], value) for name, value in frozen.items())
    assert sum(p.numel() for p in trained_parameters(student)) == 2 * 2 * 6 * 2
    learnt = put_coefficients(share, "learnt", take_coefficients(student, 0))
    assert F.mse_loss(with_adapter(copy_of(base), learnt.rebuild("learnt"))(x), student_output(student, x)) < 1e-9


def student_output(student: nn.Module, x: Tensor) -> Tensor:
    with using_tasks(student, 0), torch.no_grad():
        return student(x)  # type: ignore[no-any-return]


def test_temporary_directions_learn_what_the_basis_cannot_and_are_merged() -> None:
    torch.manual_seed(1)
    base, x = model(), torch.randn(64, 12)
    share = consolidate(for_attention(2), ShareConfig(k=SizeConfig(fixed=4)))
    loss = teacher(base, x, for_attention(1, seed=7)["task0"])
    final = {}
    for name, options in (("coefficients", LearnConfig(p=None)), ("temporary", LearnConfig(phi=1))):
        student = copy_of(base)
        attach(student, share, options, fresh=1)
        final[name] = fine_tune(student, lambda student=student: loss(student), updates=300)[-1]  # type: ignore[misc]
    assert final["temporary"] < 0.8 * final["coefficients"]
    learnt = take_adapter(student, 0)
    assert F.mse_loss(with_adapter(copy_of(base), learnt)(x), student_output(student, x)) < 1e-9
    bigger = merge(consolidate(for_attention(2), ShareConfig(k=SizeConfig(fixed=5))), {"learnt": learnt})
    assert bigger.errors()["block.q_proj"]["learnt"] < 0.9
    # phi directions of both sides, and phi x p coefficients on either side, in each of two layers
    assert sum(p.numel() for p in trained_parameters(student)) == 2 * (8 + 12 + 2 * 2)


def test_fine_tuning_after_a_merge_regains_what_it_lost() -> None:
    base, x = model(), torch.randn(64, 12)
    given = for_attention(6)
    share = consolidate(given, ShareConfig(k=SizeConfig(fixed=4)))
    loss = teacher(base, x, given["task0"])
    student = copy_of(base)
    attach(student, share, LearnConfig(), tasks=("task0",))
    losses = fine_tune(student, lambda: loss(student), updates=200)
    assert losses[-1] < 0.8 * losses[0]


def test_models_that_do_not_fit(share: Share) -> None:
    for wrong, named in (
        (nn.Sequential(nn.Linear(12, 8)), "it has 0"),
        (
            nn.ModuleDict({"block": nn.ModuleDict({"q_proj": nn.Linear(12, 9), "v_proj": nn.Linear(12, 8)})}),
            "9 x 12",
        ),
    ):
        before = [type(child) for child in wrong.modules()]
        with pytest.raises(UserError, match=named):
            attach(wrong, share, LearnConfig(), fresh=1)
        assert [type(child) for child in wrong.modules()] == before  # nothing is half done


@pytest.mark.parametrize(
    ("options", "tasks", "fresh", "named"),
    [
        (LearnConfig(), (), 0, "no tasks"),
        (LearnConfig(), ("nobody",), 0, "unknown task 'nobody'"),
        (LearnConfig(phi=2), (), 1, "must be between 1 and 1"),
        (LearnConfig(phi=0), (), 1, "phi is 0"),
        (LearnConfig(p=0), (), 1, "p is 0"),
        (LearnConfig(p="half"), (), 1, "p is half; give a number of at least 1, third of the rank"),
        (LearnConfig(phi=1), ("task0",), 1, "one fresh task"),
        (LearnConfig(phi=1), (), 2, "one fresh task"),
        (LearnConfig(phi=1, variational=True), (), 1, "no posterior"),
        (LearnConfig(prior_scale=0.0), (), 1, "prior_scale is 0"),
        (LearnConfig(prior_tasks=0.0), (), 1, "prior_tasks is 0"),
        (LearnConfig(variational=True, p=1), (), 1, "p is 1"),
    ],
)
def test_learning_options_that_cannot_be(
    share: Share, options: LearnConfig, tasks: tuple[str, ...], fresh: int, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        attach(model(), share, options, tasks, fresh)


def test_delta_has_nothing_to_learn_in() -> None:
    from varshare_rl.transfer.share import BasisMethod

    share = consolidate(for_attention(), ShareConfig(BasisMethod.delta, SizeConfig(fixed=3)))
    with pytest.raises(UserError, match="not in those of delta"):
        attach(model(), share, LearnConfig(), fresh=1)


def test_mixed_shapes_keep_phi_within_each_layer() -> None:
    share = consolidate(adapters(3, 4, layers=1), ShareConfig(k=SizeConfig(fixed=12)))
    layer = attach(nn.ModuleDict({"layer0": nn.Linear(40, 30)}), share, LearnConfig(phi=3), fresh=1)["layer0"]
    assert layer.temporary is not None
    torch.testing.assert_close(layer.temporary.directions_B.detach(), layer.basis_B[:, :3])
    assert [name for name, _ in share_layers(nn.ModuleDict({"a": layer}))] == ["a"]


def test_the_divergence_reaches_the_objective(share: Share) -> None:
    student = model()
    attach(student, share, LearnConfig(variational=True), tasks=("task0",), fresh=2)
    nats = total_kl(student, 3).detach()
    assert nats.shape == (3,)
    assert float(nats.min()) > 0
    plain = model()
    attach(plain, share, LearnConfig(p=None), fresh=2)
    assert torch.equal(total_kl(plain, 2), torch.zeros(2))


def basis_for(path: str, inputs: int, outputs: int) -> Share:
    made = {str(seed): {path: LowRank(torch.randn(2, inputs), torch.randn(outputs, 2), 0.5)} for seed in range(3)}
    return consolidate(made, ShareConfig(k=SizeConfig(max_error=1e-3)))


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is stored ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
def test_a_transposed_weight_is_taken_as_it_acts(sizes: tuple[int, int]) -> None:
    inputs, outputs = sizes
    model, share = nn.Sequential(Conv1D(outputs, inputs)), basis_for("0", inputs, outputs)
    x = torch.randn(5, inputs)
    expected = model(x) + x @ share.rebuild("1")["0"].delta().T
    attach(model, share, LearnConfig(), tasks=["0", "1"])
    with using_tasks(model, 1):
        torch.testing.assert_close(model(x), expected)


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


UNFIT = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(4, 4)), "0", "a Embedding; only linear layers"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "out_proj", "attention uses without calling"),
    "hooks": (lambda: nn.Sequential(hooked()), "0", "has forward hooks"),
    "made": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "0", "anew at every call"
    ),
    "own_forward": (lambda: nn.Sequential(Doubled(4, 4)), "0", "whose own forward would be lost"),
    "missing": (lambda: nn.Sequential(nn.Linear(4, 4)), "1", "no linear module '1'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_modules_that_are_more_than_a_weight_are_refused(case: str) -> None:
    make, path, reason = UNFIT[case]
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=reason):
        attach(model, basis_for(path, 4, 4), LearnConfig(), fresh=1)
    assert [type(module) for module in model.modules()] == kinds


def test_a_module_at_two_paths_is_replaced_at_both() -> None:
    same = nn.Linear(4, 4)
    model = nn.Sequential(same, nn.Tanh(), same)
    share = basis_for("2", 4, 4)
    layers = attach(model, share, LearnConfig(), tasks=["0"])
    assert model[0] is model[2] is layers["2"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [False, True])
def test_pytorchs_encoder_and_modules_that_read_the_weight(padding: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    share = basis_for("layers.1.linear2", 16, 8)
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[False] * 3, [False, False, True]]) if padding else None
    weight = model.layers[1].linear2.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    plain = weight.detach().clone()
    with torch.no_grad():
        weight.add_(share.rebuild("2")["layers.1.linear2"].delta())
        expected = model(x, src_key_padding_mask=mask)
        weight.copy_(plain)
    layer = attach(model, share, LearnConfig(), tasks=["0", "2"])["layers.1.linear2"]
    kept = slice(None) if mask is None else ~mask
    with torch.no_grad(), using_tasks(model, 1):
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], expected[kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            layer.weight + 0, plain + share.rebuild("2")["layers.1.linear2"].delta(), rtol=1e-4, atol=1e-5
        )
    with using_tasks(model, torch.tensor([0, 1])), pytest.raises(UserError, match="there is no one task"):
        layer.weight + 0


def test_new_tasks_have_a_third_of_the_rank_as_columns() -> None:
    share = consolidate(
        {str(rank): {"0": LowRank(torch.randn(rank, 9), torch.randn(9, rank))} for rank in (2, 4)}, ShareConfig()
    )
    for options, columns in (
        (LearnConfig(), 2),
        (LearnConfig(p=None), 4),
        (LearnConfig(p=3), 3),
        (LearnConfig(variational=True), 4),
    ):
        layer = attach(nn.Sequential(nn.Linear(9, 9)), share, options, fresh=1)["0"]
        assert layer.coefficients.take(0).eps_B.shape[1] == columns
