"""LoRA on any module: one adapter for all rows, one for each row, merging, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PATHS, SIZE, TARGETS, Model, tokens
from torch import Tensor, nn

from varshare_rl.adapters import Adapter, AdapterSet, LoRALinear, LowRank, apply_lora, base_network, task_adapter
from varshare_rl.errors import UserError
from varshare_rl.nn import IndependentConfig, L2SoftConfig, Posterior, SharedConfig, VarShareLoRAConfig
from varshare_rl.nn import LoRAConfig as LoRANetwork
from varshare_rl.nn.parameters import count_trainable

NAMES = ["one", "two", "three"]


def adapted(dropout: float = 0.0) -> AdapterSet:
    """Three adapters of ranks 1, 2 and 3, with factors of ordinary size and scales of their own."""
    lora = apply_lora(Model().double(), TARGETS, rank=2, dropout=dropout)
    for rank, name in enumerate(NAMES, start=1):
        lora.add(name, rank=rank, alpha=1.5)
        with torch.no_grad():
            for factor in lora.parameters(name):
                factor.normal_()
    return lora


def naive(lora: AdapterSet, x: Tensor, name: str) -> Tensor:
    """The plain model with ``W + scale b a`` built in full."""
    adapter = lora.adapter(name)
    model = copy.deepcopy(lora.model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
            with torch.no_grad():
                layer.base.weight += adapter[path].scale * adapter[path].b @ adapter[path].a
    return model(x)  # type: ignore[no-any-return]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("targets", [TARGETS, r"blocks\.\d+\.[qv]_proj", PATHS])
def test_targets_are_paths_their_ends_or_one_expression(targets: list[str] | str) -> None:
    lora = apply_lora(Model(), targets)
    assert sorted(lora.layers) == sorted(PATHS)
    assert {path for path, module in lora.model.named_modules() if isinstance(module, LoRALinear)} == set(PATHS)


@pytest.mark.parametrize(
    ("rank", "trainable", "percent"), [(4, 8_000, 0.7937), (8, 16_000, 1.5748), (16, 32_000, 3.1008)]
)
def test_counts_of_a_square_layer(rank: int, trainable: int, percent: float) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    apply_lora(model, ["0"], rank).add("task")
    count = count_trainable(model)
    assert (count.trainable, count.frozen, count.total) == (trainable, 1_000_000, 1_000_000 + trainable)
    assert count.percent == pytest.approx(percent, abs=1e-4)
    assert str(count) == f"{trainable:,} of {1_000_000 + trainable:,} parameters learn ({percent:.3g} %)"


def test_fresh_adapters_change_nothing_and_the_base_is_frozen() -> None:
    model, x = Model(), tokens()
    before = model(x)
    lora = apply_lora(model, TARGETS, rank=3)
    lora.add("task")
    lora.activate("task")
    assert torch.equal(model(x), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{path}.{factor}:task" for path in PATHS for factor in "ab"}
    a = lora.adapter("task")["blocks.0.q_proj"].a
    assert 0 < a.abs().max() <= SIZE**-0.5


@pytest.mark.parametrize(("rslora", "scale"), [(False, 1.5), (True, 3.0)])
def test_scales_by_hand(rslora: bool, scale: float) -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], rank=4, alpha=6.0, rslora=rslora)
    lora.add("task")
    assert lora.adapter("task")["0"].scale == scale
    lora.add("other", rank=9, alpha=4.5)
    assert lora.adapter("other")["0"].scale == (1.5 if rslora else 0.5)
    plain = apply_lora(nn.Sequential(nn.Linear(2, 2)), ["0"], rank=4)
    plain.add("task", rank=2)
    assert plain.adapter("task")["0"].scale == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_the_active_adapter_is_the_correction_built_in_full(name: str) -> None:
    lora, x = adapted(), tokens()
    lora.activate(name)
    torch.testing.assert_close(lora.model(x), naive(lora, x, name), rtol=0, atol=1e-12)
    lora.activate(None)
    plain = lora.model(x)
    assert lora.active is None
    assert torch.equal(copy.deepcopy(lora).unload()(x), plain)


MIXED = {
    "all": ["two", "one", "two", "three", "one", "two", "three"],
    "two_of_three": ["three", "one", "one", "three", "one", "three", "three"],
    "one": ["two"] * 7,
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("by_id", [False, True])
def test_rows_have_their_own_adapters(case: str, by_id: bool) -> None:
    lora, x, names = adapted(), tokens(), MIXED[case]
    lora.activate("three")
    expected = torch.cat([naive(lora, row.unsqueeze(0), name) for row, name in zip(x, names, strict=True)])
    with lora.rows(torch.tensor([NAMES.index(name) for name in names]) if by_id else names):
        found = lora.model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert lora.active == "three"


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 5, 2), (0,)])
@pytest.mark.parametrize("names", [["two", "three", "one"], ["two", "two", "one"]])
def test_rows_come_in_any_layout(shape: tuple[int, ...], names: list[str]) -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(4, 5)).double(), ["0"])
    for rank, name in enumerate(NAMES, start=1):
        lora.add(name, {"0": LowRank(torch.randn(rank, 4), torch.randn(5, rank), rank / 2)})
    x = torch.randn(*shape, 4, dtype=torch.float64)
    with lora.rows(names[: shape[0]]):
        found = lora.model(x)
    rows = [naive(lora, row, name) for row, name in zip(x, names, strict=False)]
    expected = torch.stack(rows) if rows else torch.zeros(0, 5, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows_alone() -> None:
    lora, x = adapted(), tokens()
    names = MIXED["two_of_three"]
    weights = torch.randn(7, 4, 3, dtype=torch.float64)
    with lora.rows(names):
        (lora.model(x) * weights).sum().backward()
    assert all(factor.grad is None for factor in lora.parameters("two"))
    assert all(parameter.grad is None for parameter in lora.model.parameters() if not parameter.requires_grad)
    found = {name: [factor.grad for factor in lora.parameters(name)] for name in ("one", "three")}
    for name, grads in found.items():
        lora.model.zero_grad()
        lora.activate(name)
        rows = torch.tensor([row == name for row in names])
        (lora.model(x[rows]) * weights[rows]).sum().backward()
        for grad, factor in zip(grads, lora.parameters(name), strict=True):
            torch.testing.assert_close(grad, factor.grad, rtol=0, atol=1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(3, 2)).double(), ["0"])
    for rank, name in enumerate(NAMES[:2], start=1):
        lora.add(name, {"0": LowRank(torch.randn(rank, 3), torch.randn(2, rank), 0.7)})
    factors = [factor for name in NAMES[:2] for factor in lora.parameters(name)]

    def output(x: Tensor, *_: Tensor) -> Tensor:
        with lora.rows(["two", "one", "two"]):
            return lora.model(x)  # type: ignore[no-any-return]

    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x, *factors))


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    lora, x = adapted(dropout=0.4), torch.randn(2, SIZE, dtype=torch.float64)
    layer = lora.layers["blocks.0.q_proj"]
    lora.activate("three")
    lora.model.eval()
    exact = layer(x)
    assert torch.equal(layer(x), exact)
    lora.model.train()
    draws = torch.stack([layer(x) for _ in range(4000)])
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 4000**0.5).all()
    with lora.rows(["one", "three"]):
        assert not torch.equal(layer(x), layer(x))
    lora.activate(None)
    assert torch.equal(layer(x), layer.base(x))


def test_merge_and_unmerge() -> None:
    lora, x = adapted(), tokens()
    before = bits(lora.model)
    lora.activate("two")
    expected = lora.model(x)
    for _ in range(2):  # twice is once
        lora.merge()
        torch.testing.assert_close(lora.model(x), expected, rtol=0, atol=1e-12)
        assert lora.merged == "two"
    with pytest.raises(UserError, match="'two' is merged"):
        lora.merge("one")
    with pytest.raises(UserError, match="'two' is merged"):
        lora.activate("one")
    with pytest.raises(UserError, match="'two' is merged"), lora.rows(["one"] * 7):
        pass
    with pytest.raises(UserError, match="merged into the base"):
        lora.remove("two")
    for _ in range(2):
        lora.unmerge()
        after = bits(lora.model)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert lora.merged is None
    assert torch.equal(lora.model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit_where_subtraction_would_not(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(30, 30)).to(dtype)
    lora = apply_lora(model, ["0"])
    lora.add("task", {"0": LowRank(torch.randn(2, 30), torch.randn(30, 2), 1e3)})
    before = bits(model)
    lora.merge("task")
    base = lora.layers["0"].base.weight
    subtracted = (base - lora.adapter("task")["0"].delta()).to(dtype)
    lora.unmerge()
    assert torch.equal(model[0].base.weight, before["0.base.weight"])  # type: ignore[union-attr]
    assert not torch.equal(subtracted, before["0.base.weight"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_factors_are_not_merged(value: float) -> None:
    lora = adapted()
    with torch.no_grad():
        lora.parameters("two")[-1][0, 0] = value
    before = bits(lora.model)
    with pytest.raises(UserError, match=r"NaN or an infinity at blocks\.1\.v_proj"):
        lora.merge("two")
    after = bits(lora.model)
    assert all(torch.equal(before[key], after[key]) for key in before if "base" in key)
    assert lora.merged is None


def test_a_weight_that_serves_elsewhere_is_not_merged() -> None:
    model = Model()
    model.embed.weight = nn.Parameter(torch.randn(3, SIZE))
    model.head.weight = model.embed.weight
    lora = apply_lora(model, ["head"])
    lora.add("task")
    with pytest.raises(UserError, match=r"serves other modules too \(embed\.weight, head\.base\.weight\)"):
        lora.merge("task")


def test_unload_gives_the_plain_model_back() -> None:
    model, x = Model(), tokens()
    model.embed.weight.requires_grad_(False)
    kinds, before = [type(module) for module in model.modules()], model(x)
    lora = apply_lora(model, TARGETS)
    lora.add("task")
    with torch.no_grad():
        for factor in lora.parameters("task"):
            factor.normal_()
    assert lora.unload() is model
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(x), before)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {"embed.weight"}


def test_merge_and_unload_give_the_model_of_one_adapter() -> None:
    lora, x = adapted(), tokens()
    expected = naive(lora, x, "three")
    lora.merge("three")
    assert torch.equal(lora.unload()(x), expected)


def test_adapters_are_saved_loaded_and_removed(tmp_path: Path) -> None:
    lora, x = adapted(dropout=0.3), tokens()
    lora.model.eval()
    outputs = {}
    for name in NAMES:
        lora.save(name, tmp_path / name)
        lora.activate(name)
        outputs[name] = lora.model(x)
    lora.remove("three")
    assert (lora.names, lora.active) == (("one", "two"), None)
    with pytest.raises(UserError, match="unknown adapter 'three'; there are one, two"):
        lora.activate("three")
    lora.remove("one")
    lora.load(tmp_path / "three", "again")
    lora.load(tmp_path / "one", "one")
    assert lora.names == ("two", "again", "one")
    for name, known in {"again": "three", "one": "one", "two": "two"}.items():
        lora.activate(name)
        torch.testing.assert_close(lora.model(x), outputs[known], rtol=0, atol=1e-12)
    assert lora.layers[PATHS[0]].settings["again"].dropout == 0.3


def test_an_adapter_may_leave_modules_alone() -> None:
    lora, x = adapted(), tokens()
    part: Adapter = {PATHS[0]: LowRank(torch.randn(2, SIZE), torch.randn(SIZE, 2))}
    lora.add("part", part)
    names = ["part", "one", "part", "two", "one", "two", "part"]
    assert list(lora.adapter("part")) == [PATHS[0]]
    for name in ("part", "one"):
        lora.activate(name)
        zero = LowRank(torch.zeros(1, SIZE), torch.zeros(SIZE, 1))
        full = AdapterSet.adapter(lora, name) | {path: zero for path in PATHS if path not in lora.adapter(name)}
        other = copy.deepcopy(lora)
        other.add("full", full)
        other.activate("full")
        torch.testing.assert_close(lora.model(x), other.model(x), rtol=0, atol=1e-12)
    with lora.rows(names):
        mixed = lora.model(x)
    for row, name in enumerate(names):
        lora.activate(name)
        torch.testing.assert_close(mixed[row : row + 1], lora.model(x[row : row + 1]), rtol=0, atol=1e-12)


def test_what_cannot_be_adapted_is_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"'query' matches nothing; linear modules are blocks\.0\.q_proj"):
        apply_lora(Model(), ["q_proj", "query"])
    with pytest.raises(UserError, match="matches nothing"):
        apply_lora(Model(), "q_proj")  # an expression matches whole paths
    with pytest.raises(UserError, match="no regular expression"):
        apply_lora(Model(), "(")
    with pytest.raises(UserError, match="embed, a Embedding"):
        apply_lora(Model(), ["embed"])
    with pytest.raises(UserError, match="NonDynamicallyQuantizableLinear"):
        apply_lora(nn.MultiheadAttention(4, 2), ["out_proj"])
    with pytest.raises(UserError, match="is empty"):
        apply_lora(Model(), [])
    with pytest.raises(UserError, match="linear modules are none"):
        apply_lora(nn.ReLU(), ["x"])
    model = Model()
    apply_lora(model, TARGETS)
    with pytest.raises(UserError, match="has adapters already"):
        apply_lora(model, TARGETS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0"), ({"dropout": 1.0}, "dropout is 1")],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        apply_lora(Model(), TARGETS, **settings)  # type: ignore[arg-type]


def test_adapters_that_do_not_fit_are_refused() -> None:
    lora = adapted()
    good = LowRank(torch.zeros(1, SIZE), torch.zeros(SIZE, 1))
    for name, adapter, named in (
        ("one", None, "'one' already"),
        ("a.b", None, "without dots"),
        ("", None, "without dots"),
        ("new", {}, "no factors"),
        ("new", {PATHS[0]: good, "head": good}, r"factors for head, which is not among .*q_proj"),
        ("new", {PATHS[0]: LowRank(torch.zeros(1, 4), torch.zeros(SIZE, 1))}, "maps 4 to 6 at"),
    ):
        with pytest.raises(UserError, match=named):
            lora.add(name, adapter)
    with pytest.raises(ValueError, match="give either"):
        lora.add("new", lora.adapter("one"), rank=3)
    assert lora.names == tuple(NAMES)
    assert all(list(layer.settings) == NAMES for layer in lora.layers.values())


def test_wrong_rows_are_refused() -> None:
    lora, x = adapted(), tokens()
    for wrong, kind, named in (
        (["one", "four"], UserError, "unknown adapter 'four'; there are one, two, three"),
        (torch.tensor([0, 3]), IndexError, "unknown adapter id 3: there are 3"),
        (torch.tensor([-1]), IndexError, "unknown adapter id -1"),
        (torch.tensor([0.0]), ValueError, "give integers"),
        (torch.tensor(0), ValueError, "give integers"),
    ):
        with pytest.raises(kind, match=named), lora.rows(wrong):
            pass
    with pytest.raises(ValueError, match="does not fit 6 rows"), lora.rows(["one"] * 6):
        lora.model(x)
    assert lora.active is None
    for change in (lora.merge, lora.remove, lora.activate):
        with lora.rows(["one"] * 7), pytest.raises(UserError, match=r"leave the block of rows"):
            change("one")
    with pytest.raises(UserError, match="no adapter is active"):
        lora.merge()


def test_training_moves_the_rows_own_adapters_and_nothing_else() -> None:
    lora, x = adapted(), tokens()
    before = bits(lora.model)
    optimizer = torch.optim.Adam([factor for name in NAMES for factor in lora.parameters(name)], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with lora.rows(["one"] * 3 + ["three"] * 4):
            lora.model(x).square().mean().backward()
        optimizer.step()
    changed = {key for key, value in bits(lora.model).items() if not torch.equal(value, before[key])}
    assert changed == {f"{path}.{factor}:{name}" for path in PATHS for factor in "ab" for name in ("one", "three")}


@pytest.mark.parametrize("kind", [VarShareLoRAConfig, LoRANetwork, L2SoftConfig])
def test_a_trained_agents_corrections_are_adapters_of_its_shared_network(kind: Any) -> None:
    options = kind(hidden=[7, 6], rank=3, alpha=2.0, layer_norm=True)
    network = options.build(5, 4, 3, Posterior()).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.5)
    network.eval()
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    base = base_network(network)
    lora = apply_lora(base, ["0", "3", "6"])
    for task, name in enumerate(NAMES):
        lora.add(name, task_adapter(network, task))
    expected = network(x, torch.arange(3))
    for task, name in enumerate(NAMES):
        lora.activate(name)
        torch.testing.assert_close(base(x[task]), expected[task], rtol=0, atol=1e-12)
    with lora.rows(NAMES):  # task-major, as everywhere in this package
        torch.testing.assert_close(base(x), expected, rtol=0, atol=1e-12)
    with pytest.raises(IndexError, match="unknown task id 3"):
        task_adapter(network, 3)


@pytest.mark.parametrize(
    "options", [IndependentConfig(hidden=[7]), SharedConfig(hidden=[7]), L2SoftConfig(hidden=[7], rank=None)]
)
def test_networks_without_low_rank_corrections_have_no_adapters(options: Any) -> None:
    with pytest.raises(UserError, match="Layer has no low-rank correction"):
        task_adapter(options.build(5, 4, 3, Posterior()), 0)


def test_initial_factors() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(2000, 30)), ["0"])
    lora.add("gaussian", rank=4, init="gaussian")
    lora.add("kaiming", rank=4)
    a = lora.adapter("gaussian")["0"].a
    assert float(a.std()) == pytest.approx(0.25, rel=0.05)
    assert float(a.abs().max()) > 0.5
    assert float(lora.adapter("kaiming")["0"].a.abs().max()) <= 2000**-0.5
    assert not lora.adapter("gaussian")["0"].b.any()
    with pytest.raises(UserError, match="has a lower one"):
        lora.add("new", rank=31, init="pissa")
    with pytest.raises(ValueError, match="init is 'zero'; choose kaiming, gaussian, pissa, olora"):
        lora.add("new", init="zero")
    assert lora.names == ("gaussian", "kaiming")


def test_groups_give_b_a_rate_of_its_own() -> None:
    lora = adapted()
    slow, fast = lora.groups("two", 1e-3, b_ratio=16.0)
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    layer = lora.layers[PATHS[0]]
    assert slow["params"][0] is layer.factors("two")[0]
    assert fast["params"][0] is layer.factors("two")[1]
    assert len(slow["params"]) == len(fast["params"]) == len(PATHS)
    with pytest.raises(ValueError, match="b_ratio is 0"):
        lora.groups("two", 1e-3, b_ratio=0.0)
