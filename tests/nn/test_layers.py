"""The stochastic layers against a loop over tasks that builds every weight, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import hold_noise
from naive import naive_layer, scramble
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varshare_rl.nn import (
    IndependentLayer,
    L2SoftLayer,
    ResidualLayer,
    SharedLayer,
    TaskEmbeddingLayer,
    VarShareLayer,
    VarShareLoRALayer,
)

TASKS, IN, OUT = 5, 7, 4
Layer = (
    VarShareLoRALayer
    | VarShareLayer
    | IndependentLayer
    | SharedLayer
    | ResidualLayer
    | L2SoftLayer
    | TaskEmbeddingLayer
)

LAYERS: dict[str, Callable[[], Layer]] = {
    "varshare_lora": lambda: VarShareLoRALayer(IN, OUT, TASKS, rank=3),
    "varshare_lora_scaled_no_bias": lambda: VarShareLoRALayer(IN, OUT, TASKS, rank=2, alpha=5.0, bias=False),
    "varshare": lambda: VarShareLayer(IN, OUT, TASKS),
    "varshare_no_bias": lambda: VarShareLayer(IN, OUT, TASKS, bias=False),
    "independent": lambda: IndependentLayer(IN, OUT, TASKS),
    "shared": lambda: SharedLayer(IN, OUT, TASKS),
    "residual": lambda: ResidualLayer(IN, OUT, TASKS, rank=2, alpha=5.0),
    "residual_full_rank": lambda: ResidualLayer(IN, OUT, TASKS, rank=None),
    "l2_soft": lambda: L2SoftLayer(IN, OUT, TASKS, rank=3),
    "task_embedding": lambda: TaskEmbeddingLayer(IN, OUT, TASKS, embedding=3),
}
STOCHASTIC = [name for name in LAYERS if name.startswith("varshare")]

LAYOUTS: dict[str, tuple[tuple[int, ...], list[int] | int]] = {
    "all_tasks": ((TASKS, 6, IN), [0, 1, 2, 3, 4]),
    "permuted": ((TASKS, 6, IN), [3, 0, 4, 2, 1]),
    "subset": ((2, 6, IN), [4, 1]),
    "repeated": ((4, 3, IN), [2, 2, 0, 2]),
    "one_id": ((6, IN), 3),
    "one_id_any_shape": ((2, 3, 4, IN), 1),
    "one_id_one_row": ((IN,), 2),
    "flat": ((8, IN), [0, 4, 4, 1, 0, 3, 4, 2]),
    "flat_one_row": ((1, IN), [4]),
    "flat_absent_tasks": ((5, IN), [3, 1, 3, 3, 1]),
    "flat_imbalanced": ((42, IN), [2] * 20 + [0] + [2] * 20 + [4]),
    "flat_as_many_rows_as_tasks": ((TASKS, IN), [0, 1, 2, 3, 4]),
}


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Layer:
    return scrambled(request.param)


@pytest.fixture(params=STOCHASTIC)
def stochastic(request: pytest.FixtureRequest) -> VarShareLoRALayer | VarShareLayer:
    made = scrambled(request.param)
    assert isinstance(made, VarShareLoRALayer | VarShareLayer)
    return made


def scrambled(name: str) -> Layer:
    made = LAYERS[name]().double()
    scramble(made)
    return made


def as_ids(ids: list[int] | int) -> Tensor | int:
    return ids if isinstance(ids, int) else torch.tensor(ids)


def gradients(layer: Layer, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Gradient of a fixed function of ``y`` to the input and every parameter (zeros where there is none)."""
    target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    inputs = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(((y - target) ** 2).sum(), list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), found, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["held_noise", "held_noise_colder", "means"])
def test_values_and_gradients_equal_a_naive_loop(layer: Layer, layout: str, mode: str) -> None:
    shape, ids = LAYOUTS[layout]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hold_noise(layer)
    layer.train(mode != "means")
    temperature = 0.3 if mode == "held_noise_colder" else 1.0
    ours = layer(x, as_ids(ids), temperature)
    naive = naive_layer(layer, x, ids, temperature)
    assert ours.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)
    got, expected = gradients(layer, ours, x), gradients(layer, naive, x)
    for name in expected:
        close = torch.isclose(got[name], expected[name], rtol=1e-10, atol=1e-11)
        assert close.all(), name


def test_one_id_may_be_a_tensor(layer: Layer) -> None:
    layer.eval()
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(layer(x, torch.tensor(2)), layer(x, 2))
    assert torch.equal(layer(x, torch.tensor(2, dtype=torch.int32)), layer(x, 2))


def test_an_empty_flat_batch_gives_an_empty_output(layer: Layer) -> None:
    hold_noise(layer)
    for training in (True, False):
        layer.train(training)
        y = layer(torch.empty(0, IN, dtype=torch.float64), torch.empty(0, dtype=torch.int64))
        assert y.shape == (0, OUT)


def test_a_task_with_no_rows_gives_no_rows(layer: Layer) -> None:
    assert layer(torch.empty(TASKS, 0, IN, dtype=torch.float64), torch.arange(TASKS)).shape == (TASKS, 0, OUT)


@pytest.mark.parametrize(
    ("shape", "ids", "named"),
    [
        ((3, 2, IN), [0, 5, 1], 5),
        ((3, 2, IN), [0, -1, 1], -1),
        ((4, IN), [0, 1, 12, 2], 12),
        ((4, IN), [0, 1, -7, 2], -7),
        ((4, IN), 5, 5),
        ((4, IN), -1, -1),
    ],
)
def test_an_unknown_id_is_an_error_that_names_it(
    layer: Layer, shape: tuple[int, ...], ids: list[int] | int, named: int
) -> None:
    message = rf"^unknown task id {named}: this network has {TASKS} tasks \(0 to {TASKS - 1}\)$"
    with pytest.raises(IndexError, match=message):
        layer(torch.zeros(shape, dtype=torch.float64), as_ids(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_ids_that_are_not_integers_are_refused(layer: Layer, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"task ids have dtype {dtype}; they must be integers"):
        layer(torch.zeros(2, IN, dtype=torch.float64), torch.tensor([0, 1]).to(dtype))
    with pytest.raises(ValueError, match="must be integers"):
        layer(torch.zeros(2, IN, dtype=torch.float64), torch.tensor(1).to(dtype))


@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        ((3, 2, IN), [0, 1]),
        ((4, IN), [0, 1, 2]),
        ((2, 3, 4, IN), [0, 1]),
        ((IN,), [0]),
        ((2, 2, IN), [[0, 1], [0, 1]]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(layer: Layer, shape: tuple[int, ...], ids: list[int]) -> None:
    with pytest.raises(ValueError, match="does not fit task ids of shape"):
        layer(torch.zeros(shape, dtype=torch.float64), torch.tensor(ids))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_fresh_layer_in_eval_mode_is_the_shared_linear_layer_exactly(name: str) -> None:
    made = LAYERS[name]().eval()
    assert isinstance(made, VarShareLoRALayer | VarShareLayer)
    x = torch.randn(TASKS, 6, IN)
    assert torch.equal(made(x, torch.arange(TASKS)), F.linear(x, made.theta, made.bias))
    assert torch.equal(made(x[0], 3), F.linear(x[0], made.theta, made.bias))
    flat = torch.randn(9, IN)  # regrouped rows: the same up to the order in which products are summed
    torch.testing.assert_close(made(flat, torch.randint(TASKS, (9,))), F.linear(flat, made.theta, made.bias))


def test_gradcheck_with_held_noise(stochastic: VarShareLoRALayer | VarShareLayer) -> None:
    names = [name for name, _ in stochastic.named_parameters()]
    parameters = tuple(parameter for _, parameter in stochastic.named_parameters())
    hold_noise(stochastic)
    ids = torch.tensor([4, 0, 2])
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(stochastic, given, (x, ids, 0.7))

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_gradcheck_of_the_kl(stochastic: VarShareLoRALayer | VarShareLayer) -> None:
    names = [name for name, _ in stochastic.named_parameters() if name in stochastic.per_task_parameters]

    def function(*values: Tensor) -> Tensor:
        old = {name: getattr(stochastic, name) for name in names}
        for name, value in zip(names, values, strict=True):
            del stochastic._parameters[name]
            setattr(stochastic, name, value)
        try:
            return stochastic.kl()
        finally:
            for name in names:
                delattr(stochastic, name)
                stochastic.register_parameter(name, old[name])

    assert torch.autograd.gradcheck(function, tuple(getattr(stochastic, name) for name in names))


@pytest.mark.parametrize("layout", ["task_major", "flat"])
def test_no_gradient_crosses_tasks(stochastic: VarShareLoRALayer | VarShareLayer, layout: str) -> None:
    x = torch.randn(TASKS, 2, IN, dtype=torch.float64)
    ids = torch.arange(TASKS)
    if layout == "flat":
        x, ids = x.flatten(0, 1), ids.repeat_interleave(2)
    for task in range(TASKS):
        stochastic.zero_grad()
        y = stochastic(x, ids).view(TASKS, 2, OUT)
        (y[task].square().sum() + stochastic.kl()[task]).backward()
        for name in stochastic.per_task_parameters:
            grad = stochastic.get_parameter(name).grad
            assert grad is not None
            touched = grad.flatten(1).abs().sum(1) > 0
            assert touched.tolist() == [index == task for index in range(TASKS)], name


class RecordShapes(TorchDispatchMode):
    """Collects the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.shapes.add(tuple(item.shape))
        return result


@pytest.mark.parametrize("layout", ["all_tasks", "permuted", "one_id", "flat"])
def test_the_low_rank_residual_is_never_built(layout: str) -> None:
    made = VarShareLoRALayer(11, 13, TASKS, rank=2)
    shape, ids = LAYOUTS[layout]
    x = torch.randn(*shape[:-1], 11, requires_grad=True)
    with RecordShapes() as record:
        (made(x, as_ids(ids)).square().mean() + made.kl().mean()).backward()
    assert (TASKS, 2, 11) in record.shapes  # the recorder does see the factors
    squares = {shape for shape in record.shapes if len(shape) == 3 and set(shape[1:]) == {11, 13}}
    assert not squares
    full = VarShareLayer(11, 13, TASKS)
    with RecordShapes() as record:
        hold_noise(full)
        full(x, as_ids(ids))
    assert (TASKS, 13, 11) in record.shapes  # and would see a residual


def test_noise_is_fresh_in_training_and_equal_while_held(stochastic: VarShareLoRALayer | VarShareLayer) -> None:
    x, ids = torch.randn(TASKS, 2, IN, dtype=torch.float64), torch.arange(TASKS)
    assert (stochastic(x, ids) != stochastic(x, ids)).all()
    hold_noise(stochastic)
    held = stochastic(x, ids)
    assert torch.equal(held, stochastic(x, ids))
    hold_noise(stochastic)
    assert (stochastic(x, ids) != held).all()
    stochastic.noise = None
    assert (stochastic(x, ids) != stochastic(x, ids)).all()
    stochastic.eval()
    assert torch.equal(stochastic(x, ids), stochastic(x, ids))


def test_one_draw_serves_all_rows_of_a_task_in_weight_space(
    stochastic: VarShareLoRALayer | VarShareLayer,
) -> None:
    hold_noise(stochastic)
    row = torch.randn(IN, dtype=torch.float64)
    y = stochastic(row.expand(TASKS, 3, IN), torch.arange(TASKS))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert (y[0, 0] - y[1, 0]).abs().min() > 1e-6


def test_temperature_scales_the_noise(stochastic: VarShareLoRALayer | VarShareLayer) -> None:
    x, ids = torch.randn(TASKS, 2, IN, dtype=torch.float64), torch.arange(TASKS)
    mean = stochastic.eval()(x, ids)
    stochastic.train()
    assert torch.equal(stochastic(x, ids, 0.0), mean)
    hold_noise(stochastic)
    assert torch.equal(stochastic(x, ids, 0.0), mean)
    tiny, half = ((stochastic(x, ids, t) - mean) / t for t in (1e-4, 5e-5))
    torch.testing.assert_close(tiny, half, rtol=1e-2, atol=1e-3)  # linear in the limit, for products too
    assert tiny.abs().min() > 1e-6


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize(("argument", "value"), [("in_features", 0), ("out_features", 0), ("num_tasks", 0)])
def test_impossible_sizes_are_refused(name: str, argument: str, value: int) -> None:
    kind = type(LAYERS[name]())
    sizes = {"in_features": 2, "out_features": 2, "num_tasks": 2} | {argument: value}
    with pytest.raises(ValueError, match=f"{argument} is {value}; it must be positive"):
        kind(**sizes)


def test_other_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        VarShareLoRALayer(2, 2, 2, rank=0)
    with pytest.raises(ValueError, match="unknown estimator 'nope'; there are weight"):
        VarShareLoRALayer(2, 2, 2, estimator="nope")
    for kind in (VarShareLoRALayer, VarShareLayer):
        with pytest.raises(ValueError, match=r"prior_scale is 0\.0; it must be positive"):
            kind(2, 2, 2, prior_scale=0.0)
