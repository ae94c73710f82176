"""Share's promises hold for the files that it writes, whatever the precision of the adapters."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from varshare_rl.adapters import Adapter, LowRank, describe, read_adapter, write_adapter
from varshare_rl.errors import UserError
from varshare_rl.transfer.share import (
    BasisMethod,
    Merge,
    Share,
    ShareConfig,
    SizeConfig,
    add,
    consolidate,
    read_basis,
    write_basis,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files need not survive a power cut here."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def exact(factors: LowRank) -> torch.Tensor:
    return factors.scale * (factors.b.double() @ factors.a.double())


@st.composite
def adapters(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Adapter]:
    """Adapters of a few common directions and some noise, of any ranks, scales and sizes."""
    out, into = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    common = [torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in (out, into)]
    made: dict[str, Adapter] = {}
    for task in range(draw(st.integers(1, 5))):
        rank = draw(st.integers(1, 4))
        noise = draw(st.sampled_from([0.0, 1e-5, 1e-2, 1.0]))
        size_b, size_a = (10.0 ** draw(st.integers(-1, 1)) for _ in range(2))
        left, right = (
            side @ torch.randn(2, rank, generator=generator, dtype=torch.float64)
            + noise * torch.randn(len(side), rank, generator=generator, dtype=torch.float64)
            for side in common
        )
        scale = draw(st.sampled_from([1.0, 1 / 3, 16 / math.sqrt(3), -0.5, 2000.0]))
        made[f"task{task}"] = {"x": LowRank((size_a * right.T).to(dtype), (size_b * left).to(dtype), scale)}
    return made


def check_written(share: Share, originals: dict[str, Adapter]) -> None:
    """Every printed error is at least the true one of the folder that is written."""
    with tempfile.TemporaryDirectory() as folder:
        write_basis(Path(folder) / "basis", share)
        read = read_basis(Path(folder) / "basis")
        for task, adapter in originals.items():
            write_adapter(Path(folder) / "made", read.rebuild(task))
            written, _ = read_adapter(Path(folder) / "made")
            for name, factors in adapter.items():
                size = exact(factors).norm()
                error = (exact(written[name]) - exact(factors)).norm()
                if size > 0:
                    assert float(error / size) <= read.errors()[name][task] * (1 + 1e-9) + 1e-15
            if read.originals:
                kept = exact(read.originals[task]["x"])
                assert float((kept - exact(adapter["x"])).norm()) <= 2e-7 * float(exact(adapter["x"]).norm())


CONFIGS: dict[str, Any] = {
    "tight": ShareConfig(k=SizeConfig(max_error=1e-4)),
    "loose": ShareConfig(k=SizeConfig(max_error=0.2)),
    "fixed": ShareConfig(k=SizeConfig(fixed=2), p=1),
    "originals": ShareConfig(k=SizeConfig(max_error=1e-3), keep_originals=True),
    "delta": ShareConfig(BasisMethod.delta, SizeConfig(max_error=1e-4)),
    "centred": ShareConfig(BasisMethod.delta, SizeConfig(max_error=0.1), centred=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_printed_errors_hold_for_what_is_written(dtype: torch.dtype, data: st.DataObject) -> None:
    originals, config = data.draw(adapters(dtype)), CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    first = dict(list(originals.items())[:2])
    share = consolidate(first, config)
    check_written(share, first)
    when = data.draw(st.sampled_from(list(Merge)))
    for task, adapter in list(originals.items())[2:]:
        share = add(share, {task: adapter}, when)
    check_written(share, originals)
    if when is not Merge.never and config.k.max_error is not None:
        assert max(share.errors()["x"].values()) <= config.k.max_error + 1e-5


def test_sixteen_bit_adapters_keep_the_bound_that_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    common = [torch.randn(size, 6, generator=generator) for size in (40, 48)]
    originals = {
        f"task{index}": {
            "x": LowRank(
                (torch.randn(4, 6, generator=generator) @ common[1].T).bfloat16(),
                (common[0] @ torch.randn(6, 4, generator=generator)).bfloat16(),
                16 / math.sqrt(4) / 3,
            )
        }
        for index in range(8)
    }
    config = ShareConfig(k=SizeConfig(max_error=1e-4), keep_originals=True)
    share = consolidate(originals, config)
    assert max(share.errors()["x"].values()) <= 1e-4
    check_written(share, originals)


def test_half_precision_factors_whose_product_with_the_scale_overflows() -> None:
    originals = {
        str(seed): {"x": LowRank(torch.randn(2, 8).half(), (100 * torch.randn(6, 2)).half(), 2000.0)}
        for seed in range(3)
    }
    share = consolidate(originals, ShareConfig(k=SizeConfig(max_error=1e-4)))
    check_written(share, originals)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_factors(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = {"x": LowRank(torch.randn(2, 8).to(dtype), torch.randn(6, 2).to(dtype), 0.5)}
    write_adapter(tmp_path / "one", adapter, describe(adapter))
    read, _ = read_adapter(tmp_path / "one")
    assert read["x"].a.dtype == dtype
    assert read["x"].is_finite()
    share = consolidate({"one": read}, ShareConfig(k=SizeConfig(max_error=1e-4), keep_originals=True))
    check_written(share, {"one": adapter})


@pytest.mark.parametrize("size", [1e60, 1e-60])
def test_what_float32_cannot_hold_is_refused(size: float) -> None:
    a, b = torch.ones(1, 3, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(UserError, match=r"correction of size .* which float32 cannot hold"):
        consolidate({"x": {"m": LowRank(size * a, size * b)}}, ShareConfig())


def test_centred_delta_by_hand() -> None:
    """Two corrections: their mean and one direction are all there is, so k = 1 is exact; uncentred it needs 2."""
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    factors = {"one": LowRank(one, torch.tensor([[3.0]])), "two": LowRank(two, torch.tensor([[1.0]]))}
    originals = {task: {"x": own} for task, own in factors.items()}
    centred = consolidate(originals, ShareConfig(BasisMethod.delta, SizeConfig(max_error=1e-5), centred=True))
    layer: Any = centred.layers["x"]
    assert layer.k == 1
    torch.testing.assert_close(layer.mean, torch.tensor([[1.5, 0.5]]))
    assert layer.shared_numbers() == 4
    uncentred: Any = consolidate(originals, ShareConfig(BasisMethod.delta, SizeConfig(max_error=1e-5))).layers["x"]
    assert (uncentred.k, uncentred.mean) == (2, None)
    with pytest.raises(UserError, match="centred=true is for method=delta"):
        consolidate(originals, ShareConfig(centred=True))
