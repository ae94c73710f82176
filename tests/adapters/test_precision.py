"""Adapters in every precision: types, values against `peft`, and rounding that happens once."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varshare_rl.adapters import AdapterSet, LowRank, apply_lora, write_adapter
from varshare_rl.errors import UserError
from varshare_rl.nn.lora import ResidualLayer
from varshare_rl.nn.varshare_lora import VarShareLoRALayer
from varshare_rl.transfer.share import LearnConfig, ShareConfig, SizeConfig, attach, consolidate, using_tasks

peft = pytest.importorskip("peft")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Relative error of one rounding to a type, and of a product in it.
PRECISION = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
IN, OUT, ROWS = 24, 16, 6
STATES = ["inactive", "active", "rows", "merged", "dropout"]


def factors(seed: int, scale: float = 0.5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(3, IN, generator=generator), torch.randn(OUT, 3, generator=generator), scale)


def pair(tmp_path: Path, dtype: torch.dtype) -> tuple[AdapterSet, Any]:
    """Two adapters on the same base with us and with `peft`."""
    base = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    lora = apply_lora(copy.deepcopy(base), ["0"])
    for seed, name in enumerate(["one", "two"]):
        write_adapter(tmp_path / name, {"0": factors(seed)})
        lora.load(tmp_path / name, name)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    return lora, model.eval()


# autocast leaves float64 alone, and an adapter of peft's beside it, which is float32, fails
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES[1:]], ids=str
)
@pytest.mark.parametrize("state", STATES)
def test_types_and_values_are_those_of_peft(tmp_path: Path, dtype: torch.dtype, state: str, autocast: bool) -> None:
    lora, model = pair(tmp_path, dtype)
    x = torch.randn(ROWS, IN, dtype=dtype)
    names = ["two", "one", "two", "one", "one", "two"]
    block: Any = lora.rows(names) if state == "rows" else nullcontext()
    extra = {"adapter_names": names} if state == "rows" else {}
    without: Any = model.disable_adapter() if state == "inactive" else nullcontext()
    if state != "inactive":
        lora.activate("one")
    if state == "merged":
        lora.merge("one")
        model.merge_adapter(["one"])
    if state == "dropout":
        settings = lora.layers["0"].settings
        settings["one"] = type(settings["one"])(settings["one"].scale, 0.5)
        assert lora.model.training
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        with block:
            found = lora.model(x)
        with without:
            expected = model(x, **extra)
        if state == "dropout":
            found = torch.stack([lora.model(x).double() for _ in range(400)]).mean(0).to(found.dtype)
    assert found.dtype == expected.dtype
    tolerance = PRECISION[torch.bfloat16 if autocast else dtype] * 4
    if state == "dropout":
        tolerance = 0.35
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_gradients_arrive_in_the_factors_type(dtype: torch.dtype, autocast: bool, rows: bool) -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(IN, OUT)).to(dtype), ["0"], dropout=0.1)
    lora.add("one", {"0": factors(0)})
    lora.add("two", {"0": factors(1)})
    lora.activate("one")
    block: Any = lora.rows(["one", "two"] * 3) if rows else nullcontext()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), block:
        lora.model(torch.randn(ROWS, IN, dtype=dtype)).float().square().sum().backward()
    for parameter in lora.parameters("one"):
        assert parameter.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_on_a_16_bit_base_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = nn.Linear(IN, OUT).to(dtype)
    own = factors(3, scale=1 / 3)
    write_adapter(tmp_path / "one", {"0": own})
    lora = apply_lora(nn.Sequential(copy.deepcopy(base)), ["0"])
    lora.load(tmp_path / "one", "one")
    kept = lora.adapter("one")["0"]
    assert torch.equal(kept.a, own.a)
    assert torch.equal(kept.b, own.b)
    lora.merge("one")
    exact = (base.weight.double() + (own.b.double() @ own.a.double()) / 3).to(dtype)
    merged = lora.layers["0"].base.get_parameter("weight")
    assert float((merged != exact).float().mean()) < 0.02  # float32 before the rounding, not float64
    lora.unmerge()
    x = torch.randn(50, IN, dtype=dtype)
    lora.activate("one")
    delta = torch.nn.functional.linear(x.float(), own.delta())
    assert torch.equal(lora.model(x), (base(x) + delta).to(dtype)) or torch.allclose(
        lora.model(x).float(), (base(x) + delta), rtol=PRECISION[dtype] / 2, atol=0.0
    )


def test_factors_beyond_half_precision_survive() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(1, 1, bias=False)).half(), ["0"])
    lora.add("wide", {"0": LowRank(torch.tensor([[1e-8]]), torch.tensor([[1e8]]))})
    kept = lora.adapter("wide")["0"]
    assert (kept.a.item(), kept.b.item()) == (pytest.approx(1e-8), pytest.approx(1e8))
    lora.activate("wide")
    base = lora.layers["0"].base.get_parameter("weight").item()
    assert lora.model(torch.ones(1, 1).half()).item() == pytest.approx(base + 1.0, rel=1e-3)


def test_a_merge_that_would_overflow_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    lora = apply_lora(model, ["0", "1"])
    big = LowRank(torch.full((1, 4), 300.0), torch.full((4, 1), 300.0))
    small = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    lora.add("big", {"0": small, "1": big})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"'big' the weight of 1 does not fit into torch\.float16"):
        lora.merge("big")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert lora.merged is None


def test_merging_inside_autocast_is_merging() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(IN, OUT)), ["0"])
    lora.add("one", {"0": factors(0)})
    before = lora.layers["0"].base.get_parameter("weight").detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge("one")
    merged = lora.layers["0"].base.get_parameter("weight")
    torch.testing.assert_close(merged, before + factors(0).delta(), rtol=0, atol=1e-6)


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The task layers that end in the same product, for two tasks."""
    made: dict[str, nn.Module] = {"residual": ResidualLayer(IN, OUT, 2, rank=3)}
    for estimator in ("weight", "local", "flipout", "mean"):
        made[estimator] = VarShareLoRALayer(IN, OUT, 2, rank=3, estimator=estimator)
    for layer in made.values():
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "rhos" not in name:
                    parameter.normal_(0.0, 0.3)
    return {name: layer.to(dtype) for name, layer in made.items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["residual", "weight", "local", "flipout", "mean"])
def test_task_layers_in_every_precision(kind: str, dtype: torch.dtype, autocast: bool, training: bool) -> None:
    layer = layers(dtype)[kind].train(training)
    x = torch.randn(2, 5, IN, dtype=dtype)
    low = autocast and dtype is not torch.float64
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x, torch.arange(2))
    assert y.dtype == (torch.bfloat16 if low else dtype)
    y.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == dtype, name
    exact = copy.deepcopy(layer).double().eval()(x.double(), torch.arange(2)).detach()
    if kind in ("residual", "mean") or not training:
        tolerance = 6 * PRECISION[torch.bfloat16 if low else dtype] * float(exact.abs().max())
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variational", [False, True], ids=["points", "posterior"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_share_layers_in_every_precision(dtype: torch.dtype, autocast: bool, variational: bool) -> None:
    share = consolidate({"one": {"0": factors(0)}, "two": {"0": factors(1)}}, ShareConfig(k=SizeConfig(0.001)))
    base = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    model = copy.deepcopy(base)
    layer = attach(model, share, LearnConfig(variational=variational), tasks=["one", "two"])["0"]
    assert layer.basis_B.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    model.eval()
    x = torch.randn(4, IN, dtype=dtype)
    low = autocast and dtype is not torch.float64
    exact_base, deltas = base.double().requires_grad_(False), [factors(seed).delta().double() for seed in range(2)]
    for ids in (1, torch.tensor([0, 1, 1, 0])):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), using_tasks(model, ids):
            y: Tensor = model(x)
        assert y.dtype == (torch.bfloat16 if low else dtype)
        y.float().sum().backward()
        each = torch.as_tensor(ids).expand(4).tolist()
        exact = exact_base(x.double()) + torch.stack(
            [deltas[task] @ row for row, task in zip(x.double(), each, strict=True)]
        )
        tolerance = (6 * PRECISION[torch.bfloat16 if low else dtype] + 1e-5) * float(exact.abs().max())
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
