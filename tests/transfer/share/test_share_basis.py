"""Bases and coefficients against a plain numpy reference, and what must hold for any adapters."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from share_reference import adapters, dense, measured, pair, pairs_of, rebuilt, relative_error

from varshare_rl.adapters import Adapter, LowRank
from varshare_rl.errors import UserError
from varshare_rl.transfer.share import (
    BasisMethod,
    Coefficients,
    LayerBasis,
    Merge,
    Share,
    ShareConfig,
    SizeConfig,
    add,
    consolidate,
    merge,
    project,
    put_coefficients,
)
from varshare_rl.transfer.share import fit as fit_module
from varshare_rl.transfer.share.factors import balance, distance, left_singular, norm

METHODS = list(BasisMethod)
MIXED = [8, 3, 5, 1]


def fixed(k: int, method: BasisMethod = BasisMethod.share, p: int | None = None, **more: Any) -> ShareConfig:
    return ShareConfig(method, SizeConfig(fixed=k), p, **more)


def bases(share: Share) -> list[LayerBasis]:
    found = list(share.layers.values())
    assert all(isinstance(layer, LayerBasis) for layer in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("p", [None, 1, 2])
def test_equals_the_reference(method: BasisMethod, k: int, p: int | None) -> None:
    if method is BasisMethod.delta and p is not None:
        pytest.skip("delta has no columns")
    given = adapters(6, MIXED)
    share = consolidate(given, fixed(k, method, p))
    expected = rebuilt(method.value, pairs_of(given), k, p)
    for task, matrix in zip(given, expected, strict=True):
        np.testing.assert_allclose(dense(share.rebuild(task)["layer0"]), matrix, atol=2e-6 * np.abs(matrix).max())


@pytest.mark.parametrize("method", METHODS)
def test_merging_equals_decomposing_the_rebuilt_tasks_and_the_new_ones(method: BasisMethod) -> None:
    """The columns of earlier tasks are compressed before they are decomposed; that may change nothing."""
    given = adapters(9, MIXED)
    names = list(given)
    share = consolidate({name: given[name] for name in names[:5]}, fixed(6, method))
    tasks = rebuilt(method.value, pairs_of({name: given[name] for name in names[:5]}), 6)
    for step in (names[5:7], names[7:]):
        held = [pair(share.rebuild(task)["layer0"]) for task in share.tasks]
        share = merge(share, {name: given[name] for name in step})
        tasks = rebuilt(method.value, [*held, *(pair(given[name]["layer0"]) for name in step)], 6)
        for task, matrix in zip(share.tasks, tasks, strict=True):
            np.testing.assert_allclose(
                dense(share.rebuild(task)["layer0"]), matrix, atol=1e-5 * np.abs(matrix).max()
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [4, MIXED])
def test_all_directions_rebuild_everything(method: BasisMethod, ranks: Any) -> None:
    given = adapters(12, ranks)  # more columns than directions: centring takes one away otherwise
    assert max(measured(consolidate(given, fixed(1000, method)), given)) < 1e-6


def test_error_falls_with_k() -> None:
    given = adapters(6, MIXED)
    for method in METHODS:
        errors = [np.array(measured(consolidate(given, fixed(k, method)), given)) for k in range(1, 25)]
        for larger, smaller in pairwise(errors):
            assert (smaller <= larger + 1e-6).all()
        assert errors[-1].max() < errors[0].min()


@pytest.mark.parametrize("p", [None, 2])
def test_gauge_does_not_matter(p: int | None) -> None:
    """``(B G, G^-1 A)`` is the same adapter; the published form takes it for another."""
    given = adapters(6, 4)
    generator = torch.Generator().manual_seed(3)
    changed: dict[str, Adapter] = {}
    for task, adapter in given.items():
        factors = adapter["layer0"]
        gauge = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)
        a, b = gauge.inverse() @ factors.a.double(), factors.b.double() @ gauge
        changed[task] = {"layer0": LowRank(a, b, factors.scale)}
    for method, same in ((BasisMethod.share, True), (BasisMethod.delta, True), (BasisMethod.paper, False)):
        if method is BasisMethod.delta and p is not None:
            continue
        ours, theirs = (consolidate(made, fixed(5, method, p)) for made in (given, changed))
        worst = max(
            relative_error(dense(theirs.rebuild(task)["layer0"]), dense(ours.rebuild(task)["layer0"]))
            for task in given
        )
        assert (worst < 1e-5) is same, (method, worst)


def test_bases_are_orthonormal() -> None:
    share = consolidate(adapters(6, MIXED, layers=2), fixed(7))
    share = merge(share, {"new": adapters(1, 6, seed=5, layers=2)["task0"]})
    for layer in bases(share):
        for basis in (layer.basis_B, layer.basis_A):
            torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.shape[1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [None, 1, 3])
@pytest.mark.parametrize("k", [3, 12])
def test_reported_errors_are_the_measured_ones(method: BasisMethod, p: int | None, k: int) -> None:
    if method is BasisMethod.delta and p is not None:
        pytest.skip("delta has no columns")
    given = adapters(7, MIXED, layers=2)
    share = consolidate({task: given[task] for task in list(given)[:5]}, fixed(k, method, p))
    share = project(share, {task: given[task] for task in list(given)[5:]})
    for layer, by_task in share.errors().items():
        np.testing.assert_allclose(list(by_task.values()), measured(share, given, layer), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", [SizeConfig(fixed=8), SizeConfig(explained=0.7), SizeConfig(max_error=0.3)])
def test_after_merges_no_error_is_above_the_reported_one(method: BasisMethod, rule: SizeConfig) -> None:
    given = adapters(12, MIXED, shared=6, noise=0.1)
    names = list(given)
    share = consolidate({task: given[task] for task in names[:4]}, ShareConfig(method, rule))
    for task in names[4:]:
        share = merge(share, {task: given[task]})
    reported = np.array(list(share.errors()["layer0"].values()))
    true = np.array(measured(share, given))
    assert (true <= reported + 1e-5).all()
    assert reported[-1] == pytest.approx(true[-1], abs=1e-6)  # exact for the task that came last
    if rule.max_error is not None:
        assert reported.max() <= 0.3 + 1e-4


def test_any_order_agrees_to_the_reported_errors() -> None:
    given = adapters(8, MIXED, shared=6, noise=0.2)
    orders = [list(given), list(given)[::-1], [f"task{index}" for index in (3, 7, 0, 5, 1, 6, 2, 4)]]
    shares = []
    for order in orders:
        share = consolidate({task: given[task] for task in order[:3]}, fixed(8))
        for task in order[3:]:
            share = merge(share, {task: given[task]})
        shares.append(share)
    for task, adapter in given.items():
        size = np.linalg.norm(dense(adapter["layer0"]))
        for one, other in ((0, 1), (0, 2), (1, 2)):
            apart = np.linalg.norm(
                dense(shares[one].rebuild(task)["layer0"]) - dense(shares[other].rebuild(task)["layer0"])
            )
            allowed = sum(shares[index].errors()["layer0"][task] for index in (one, other))
            assert apart / size <= allowed + 1e-5
    together = consolidate(given, fixed(8))
    shuffled = consolidate({task: given[task] for task in orders[2]}, fixed(8))
    for task in given:  # in one batch the order does not matter at all
        np.testing.assert_allclose(
            dense(together.rebuild(task)["layer0"]), dense(shuffled.rebuild(task)["layer0"]), atol=1e-4
        )


@pytest.mark.parametrize("p", [None, 4])
def test_max_error_is_met_by_the_least_k(p: int | None) -> None:
    given = adapters(6, 4, shared=7, noise=0.05)
    share = consolidate(given, ShareConfig(k=SizeConfig(max_error=0.2), p=p))
    (k,) = (layer.k for layer in share.layers.values())
    assert max(measured(share, given)) <= 0.2
    assert max(measured(consolidate(given, fixed(k - 1, p=p)), given)) > 0.2
    assert k < 24


def test_explained_variance_is_met_by_the_least_k() -> None:
    given = adapters(6, 4)
    share = consolidate(given, ShareConfig(k=SizeConfig(explained=0.6)))
    (layer,) = bases(share)
    folded = [factors["layer0"].folded() for factors in given.values()]
    sides = []
    for factors in folded:
        b, a, _ = balance(factors.b.double()[None], factors.a.t().double()[None])
        sides.append((b[0], a[0]))
    shares = []
    for index in (0, 1):
        spectrum = np.linalg.svd(torch.cat([side[index] for side in sides], dim=1).numpy(), compute_uv=False)
        shares.append(np.cumsum(spectrum**2) / np.sum(spectrum**2))
    assert all(curve[layer.k - 1] >= 0.6 for curve in shares)
    assert any(curve[layer.k - 2] < 0.6 for curve in shares)


def test_originals_that_are_kept_prevent_all_drift() -> None:
    given = adapters(9, MIXED)
    names = list(given)
    share = consolidate({task: given[task] for task in names[:3]}, fixed(6, keep_originals=True))
    for task in names[3:]:
        share = merge(share, {task: given[task]})
    together = consolidate(given, fixed(6))
    np.testing.assert_allclose(measured(share, given), measured(together, given), atol=1e-6)
    np.testing.assert_allclose(list(share.errors()["layer0"].values()), measured(share, given), atol=1e-6)
    drifted = consolidate({task: given[task] for task in names[:3]}, fixed(6))
    for task in names[3:]:
        drifted = merge(drifted, {task: given[task]})
    assert np.mean(measured(drifted, given)) > np.mean(measured(together, given))
    assert share.storage().originals_bytes == together.storage().lora_bytes > 0
    assert (share.merges, drifted.merges) == (7, 7)


def test_canonical_factors_and_the_core_beat_what_was_published() -> None:
    """On unrelated adapters of rank 8, at ten directions, and with fewer columns than the rank."""
    given = adapters(6, 8, out=48, into=64, shared=12, noise=0.3, seed=1)
    raw = np.mean(measured(consolidate(given, fixed(10, BasisMethod.paper)), given))
    balanced = np.mean(measured(consolidate(given, fixed(10)), given))
    assert balanced < raw
    for p in (1, 2, 4):
        core = np.mean(measured(consolidate(given, fixed(48, p=p)), given))
        columns = np.mean(measured(consolidate(given, fixed(48, BasisMethod.paper, p)), given))
        assert core < columns
    best = [
        relative_error(rebuilt("share", [pair(a["layer0"])], 48, 4)[0], dense(a["layer0"])) for a in given.values()
    ]
    np.testing.assert_allclose(measured(consolidate(given, fixed(48, p=4)), given), best, atol=1e-5)  # Eckart-Young


def test_the_published_number_of_coefficients() -> None:
    """GLUE: 24 adapted modules are 48 factors; with k = 32 and p = 8 a task has 48 * 32 * 8 coefficients."""
    given = adapters(6, 8, out=40, into=40, layers=24)
    share = consolidate(given, fixed(32, BasisMethod.paper, p=8))
    assert sum(layer.task_numbers(0) for layer in share.layers.values()) == 12_288
    store = share.storage()
    assert store.task_bytes == 12_288 * 4
    assert store.shared_bytes == 24 * 32 * (40 + 40) * 4
    assert store.lora_task_bytes == 24 * 8 * (40 + 40) * 4


def test_storage_counts_the_basis_and_says_when_it_pays() -> None:
    given = adapters(5, 4, out=100, into=60)
    store = consolidate(given, fixed(5)).storage()
    assert (store.shared_bytes, store.task_bytes, store.lora_task_bytes) == (
        5 * 160 * 4,
        2 * 5 * 4 * 4,
        4 * 160 * 4,
    )
    assert store.total_bytes == 3200 + 5 * 160
    assert store.saving == 5 * 2560 / 4000
    assert store.saving_without_basis == 16
    # 3200 + 160 N < 2560 N from N = 2 on: at 1 it is 3360 against 2560
    assert store.break_even_tasks == 2
    assert (store.trained_numbers, store.lora_trained_numbers) == (2 * 5 * 2, 4 * 160)
    # rank 1 on a 4 x 4 layer: 4 + 4 coefficients instead of 4 + 4 numbers gain nothing
    never = consolidate(adapters(4, 1, out=4, into=4), fixed(4)).storage()
    assert never.task_bytes == never.lora_task_bytes
    assert never.break_even_tasks is None


@pytest.mark.parametrize("when", list(Merge))
def test_adding_decomposes_only_where_it_must(when: Merge) -> None:
    given = adapters(9, 4, shared=6, noise=0.01)
    stranger = adapters(1, 4, seed=8)["task0"]
    first = consolidate({task: given[task] for task in list(given)[:6]}, ShareConfig(k=SizeConfig(max_error=0.1)))
    close = add(first, {"task6": given["task6"]}, when)
    assert close.merges == (2 if when is Merge.always else 1)
    far = add(first, {"stranger": stranger}, when)
    assert far.merges == (1 if when is Merge.never else 2)
    assert (far.errors()["layer0"]["stranger"] <= 0.1 + 1e-5) is (when is not Merge.never)
    if when is Merge.needed:
        assert bases(close)[0].basis_B is bases(first)[0].basis_B
        assert list(close.errors()["layer0"].values())[:6] == list(first.errors()["layer0"].values())
    assert add(consolidate(given, fixed(4)), {"stranger": stranger}).merges == 2  # no bound to keep to


def test_the_decomposition_does_not_grow_with_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def watched(matrix: torch.Tensor) -> Any:
        widths.append(matrix.shape[1])
        return left_singular(matrix)

    monkeypatch.setattr(fit_module, "left_singular", watched)
    given = adapters(30, 4)
    share = consolidate({task: given[task] for task in list(given)[:3]}, fixed(8))
    for task in list(given)[3:]:
        share = merge(share, {task: given[task]})
    assert set(widths[4:]) == {8 + 4}


def test_coefficients_that_were_learnt_become_the_tasks_own() -> None:
    given = adapters(4, 4)
    share = consolidate(given, fixed(5))
    fresh = Coefficients(torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3), torch.rand(5, 3))
    share = put_coefficients(share, "learnt", {"layer0": fresh})
    (layer,) = bases(share)
    expected = layer.basis_B @ fresh.eps_B @ (layer.basis_A @ fresh.eps_A).t()
    torch.testing.assert_close(share.rebuild("learnt")["layer0"].delta(), expected)
    assert share.errors()["layer0"]["learnt"] == 0.0
    assert layer.norms[-1] == pytest.approx(float(expected.norm()), rel=1e-5)
    assert share.lora_numbers[-1] == 3 * 70
    assert layer.task_numbers(4) == 4 * 15  # the posterior's spreads are stored too
    tuned = put_coefficients(share, "task1", {"layer0": fresh})
    assert tuned.tasks == share.tasks
    torch.testing.assert_close(tuned.rebuild("task1")["layer0"].delta(), expected)
    torch.testing.assert_close(tuned.rebuild("task2")["layer0"].delta(), share.rebuild("task2")["layer0"].delta())
    with pytest.raises(UserError, match="keep_originals=true cannot carry"):
        put_coefficients(consolidate(given, fixed(5, keep_originals=True)), "learnt", {"layer0": fresh})
    with pytest.raises(ValueError, match="do not fit"):
        put_coefficients(share, "learnt", {"other": fresh})


def test_a_merge_carries_posteriors_along() -> None:
    """Means are mapped exactly; variances are those of the mapped variables, by Monte Carlo."""
    given = adapters(4, 4)
    share = consolidate(given, fixed(5))
    own = Coefficients(torch.randn(5, 2), torch.randn(5, 2), 0.1 + torch.rand(5, 2), 0.1 + torch.rand(5, 2))
    share = put_coefficients(share, "learnt", {"layer0": own})
    merged = merge(share, {"new": adapters(1, 4, seed=4)["task0"]})
    (before,), (after,) = bases(share), bases(merged)
    to = after.basis_B.t() @ before.basis_B
    assert own.std_B is not None
    draws = own.eps_B + own.std_B * torch.randn(40_000, 5, 2)
    moved = after.coefficients[4]
    assert moved.std_B is not None
    torch.testing.assert_close((to @ draws).mean(0), moved.eps_B, atol=0.03, rtol=0)
    torch.testing.assert_close((to @ draws).std(0), moved.std_B, atol=0.02, rtol=0)
    assert after.coefficients[0].std_B is None


def test_an_adapter_of_zeros_is_rebuilt_as_zeros() -> None:
    nothing = {"layer0": LowRank(torch.randn(2, 40), torch.zeros(30, 2))}
    for method in METHODS:
        share = consolidate({**adapters(3, 4), "nothing": nothing}, fixed(4, method))
        assert share.errors()["layer0"]["nothing"] == 0.0
        assert float(share.rebuild("nothing")["layer0"].delta().norm()) < 1e-6
    alone = consolidate({"nothing": nothing}, ShareConfig())
    assert float(alone.rebuild("nothing")["layer0"].delta().norm()) == 0.0


def test_a_rank_above_a_layers_size() -> None:
    given = adapters(3, 8, out=3, into=40)
    share = consolidate(given, ShareConfig(k=SizeConfig(max_error=0.0)))
    (layer,) = bases(share)
    assert layer.basis_B.shape == (3, 3)
    assert max(measured(share, given)) < 1e-6


def test_centring_one_rank_one_adapter_leaves_nothing() -> None:
    given = adapters(1, 1)
    with pytest.raises(UserError, match="nothing of these is left"):
        consolidate(given, fixed(1, BasisMethod.paper))
    assert max(measured(consolidate(given, fixed(1)), given)) < 1e-6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ShareConfig(k=SizeConfig(max_error=0.1, fixed=3)), "k.max_error and k.fixed"),
        (ShareConfig(k=SizeConfig(max_error=-0.1)), "k.max_error is -0.1"),
        (ShareConfig(k=SizeConfig(max_error=float("nan"))), "k.max_error is nan"),
        (ShareConfig(k=SizeConfig(explained=1.5)), "k.explained is 1.5"),
        (ShareConfig(k=SizeConfig(fixed=0)), "k.fixed is 0"),
        (ShareConfig(p=0), "p is 0"),
        (ShareConfig(BasisMethod.delta, p=2), "p is 2"),
        (ShareConfig(p=1), "cannot be met"),
    ],
)
def test_options_that_cannot_be(options: ShareConfig, named: str) -> None:
    with pytest.raises(UserError, match=named):
        consolidate(adapters(3, 4), options)


def test_adapters_that_do_not_fit() -> None:
    given = adapters(3, 4)
    share = consolidate(given, fixed(4))
    other_shape = adapters(1, 4, out=31)["task0"]
    more_modules = adapters(1, 4, layers=2)["task0"]
    broken = {"layer0": LowRank(torch.full((4, 40), float("nan")), torch.zeros(30, 4))}
    for bad, named in (
        (other_shape, "31 x 40"),
        (more_modules, "layer1"),
        ({}, "nothing for module layer0"),
        (broken, "NaN"),
    ):
        with pytest.raises(UserError, match=named):
            merge(share, {"bad": bad})
        with pytest.raises(UserError, match=named):
            project(share, {"bad": bad})
        with pytest.raises(UserError, match=named):
            consolidate({**given, "bad": bad}, fixed(4))
    with pytest.raises(UserError, match="'task1' is in the basis already"):
        merge(share, {"task1": given["task1"]})
    with pytest.raises(UserError, match="unknown task 'task9'"):
        share.rebuild("task9")
    with pytest.raises(UserError, match="no adapters"):
        consolidate({}, fixed(4))


def test_products_without_building_them() -> None:
    left, right = torch.randn(3, 7, 2).double(), torch.randn(3, 9, 2).double()
    other_left, other_right = torch.randn(3, 7, 4).double(), torch.randn(3, 9, 4).double()
    whole, other = left @ right.mT, other_left @ other_right.mT
    torch.testing.assert_close(norm(left, right), whole.norm(dim=(1, 2)))
    torch.testing.assert_close(distance(left, right, other_left, other_right), (whole - other).norm(dim=(1, 2)))
    b, a, singular = balance(left, right)
    torch.testing.assert_close(b @ a.mT, whole)
    torch.testing.assert_close(b.mT @ b, torch.diag_embed(singular))
    torch.testing.assert_close(a.mT @ a, torch.diag_embed(singular))


def test_a_task_at_the_bound_does_not_blow_up_the_basis() -> None:
    """Earlier tasks may lose nothing more: the basis grows by what new adapters need, not to everything."""
    given = adapters(24, 4, out=60, into=60, shared=6, noise=0.05)
    strangers = adapters(2, 2, out=60, into=60, seed=5)
    names = list(given)
    loose = consolidate({task: given[task] for task in names[:4]}, ShareConfig(k=SizeConfig(max_error=0.3)))
    worst = max(loose.errors()["layer0"].values())
    share = consolidate(
        {task: given[task] for task in names[:4]}, ShareConfig(k=SizeConfig(max_error=worst + 1e-5))
    )
    k = share.layers["layer0"].k
    before = dict(share.errors()["layer0"])
    share = merge(share, {f"stranger{task}": adapter for task, adapter in strangers.items()})
    assert k < share.layers["layer0"].k <= k + 4
    for task, error in before.items():
        assert share.errors()["layer0"][task] <= max(error, worst + 1e-5) + 2e-6
    true = measured(share, {task: given[task] for task in before})
    np.testing.assert_array_less(true, np.array(list(share.errors()["layer0"].values()))[:4] + 1e-5)
    torch.testing.assert_close(
        bases(share)[0].basis_B.t() @ bases(share)[0].basis_B,
        torch.eye(share.layers["layer0"].k),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_rounded_bases_do_not_make_errors(method: BasisMethod) -> None:
    """Columns in float32 are orthonormal to 1e-7, whose root would be reported as an error of 3e-4."""
    given = adapters(12, MIXED)
    names = list(given)
    share = consolidate({task: given[task] for task in names[:11]}, fixed(1000, method))
    projected = project(share, {"again": given[names[0]]})
    assert projected.errors()["layer0"]["again"] < 2e-6
    for _ in range(10):  # nothing is lost by merging with all directions, however often
        share = merge(share, {f"again{share.merges}": given[names[0]]})
    assert max(share.errors()["layer0"].values()) < 1e-5
    assert max(measured(share, {names[3]: given[names[3]]})) < 1e-5
