"""Bases on disk."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from share_reference import adapters

from varshare_rl.errors import UserError
from varshare_rl.transfer.share import (
    BasisMethod,
    Coefficients,
    Share,
    ShareConfig,
    SizeConfig,
    consolidate,
    merge,
    put_coefficients,
    read_basis,
    write_basis,
)


def assert_same(one: Share, other: Share) -> None:
    for attribute in ("config", "tasks", "lora_numbers", "merges"):
        assert getattr(one, attribute) == getattr(other, attribute), attribute
    assert one.errors() == other.errors()
    assert list(one.layers) == list(other.layers)
    for mine, theirs in zip(one.layers.values(), other.layers.values(), strict=True):
        assert type(mine) is type(theirs)
        for field in fields(mine):
            assert_same_value(getattr(mine, field.name), getattr(theirs, field.name))
    for task in one.tasks:
        for layer, factors in one.rebuild(task).items():
            assert torch.equal(factors.delta(), other.rebuild(task)[layer].delta())
    assert set(one.originals) == set(other.originals)
    for task, adapter in one.originals.items():
        for layer, factors in adapter.items():
            assert torch.equal(factors.delta(), other.originals[task][layer].delta())


def assert_same_value(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, tuple) and one and isinstance(one[0], Coefficients):
        assert isinstance(other, tuple)
        for mine, theirs in zip(one, other, strict=True):
            for field in fields(mine):
                assert_same_value(getattr(mine, field.name), getattr(theirs, field.name))
    else:
        assert one == other


@pytest.mark.parametrize("method", list(BasisMethod))
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_read_is_what_was_written(tmp_path: Path, method: BasisMethod, keep: bool) -> None:
    given = adapters(5, [4, 1, 2], layers=2)
    options = ShareConfig(method, SizeConfig(fixed=5), keep_originals=keep)
    share = consolidate(given, options)
    write_basis(tmp_path / "basis", share)
    read = read_basis(tmp_path / "basis")
    assert_same(share, read)
    more = {"more": adapters(1, 3, seed=2, layers=2)["task0"]}
    assert_same(merge(share, more), merge(read, more))


def test_posteriors_of_some_tasks(tmp_path: Path) -> None:
    share = consolidate(adapters(3, [4, 2]), ShareConfig(k=SizeConfig(fixed=5)))
    for name, p in (("first", 3), ("second", 1)):
        own = Coefficients(torch.randn(5, p), torch.randn(5, p), torch.rand(5, p), torch.rand(5, p))
        share = put_coefficients(share, name, {"layer0": own})
    share = merge(share, {"more": adapters(1, 3, seed=2)["task0"]})
    write_basis(tmp_path / "basis", share)
    assert_same(share, read_basis(tmp_path / "basis"))


def test_the_files_hold_what_is_counted(tmp_path: Path) -> None:
    share = consolidate(adapters(40, 4, out=64, into=64), ShareConfig(k=SizeConfig(fixed=16)))
    write_basis(tmp_path / "basis", share)
    size = (tmp_path / "basis" / "tensors.safetensors").stat().st_size
    total = share.storage().total_bytes
    assert total <= size < total + 1000  # a header besides
    document = json.loads((tmp_path / "basis" / "basis.json").read_text())
    assert document["storage"]["total_bytes"] == total
    assert document["layers"]["layer0"]["errors"] == list(share.layers["layer0"].errors)


def test_a_basis_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = consolidate(adapters(3, 4), ShareConfig(k=SizeConfig(fixed=5), keep_originals=True))
    second = consolidate(adapters(4, 4), ShareConfig(k=SizeConfig(fixed=5)))
    write_basis(tmp_path / "basis", first)
    write_basis(tmp_path / "basis", second)
    assert_same(second, read_basis(tmp_path / "basis"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["basis", "basis.json", "tensors.safetensors"]
    from varshare_rl.transfer.share import folder

    def broken(path: Path, content: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(folder, "write_atomically", broken)
    with pytest.raises(OSError, match="disk full"):
        write_basis(tmp_path / "basis", first)
    assert_same(second, read_basis(tmp_path / "basis"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["basis"]


@pytest.mark.parametrize("file", ["basis.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damage_is_noticed(tmp_path: Path, file: str, damage: str) -> None:
    write_basis(tmp_path / "basis", consolidate(adapters(3, 4), ShareConfig(k=SizeConfig(fixed=5))))
    path = tmp_path / "basis" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif file == "basis.json":
        path.write_bytes(content.replace(b'"task1"', b'"task7"'))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=file):
        read_basis(tmp_path / "basis")


def test_another_version_is_refused(tmp_path: Path) -> None:
    write_basis(tmp_path / "basis", consolidate(adapters(3, 4), ShareConfig(k=SizeConfig(fixed=5))))
    path = tmp_path / "basis" / "basis.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="format version 2"):
        read_basis(tmp_path / "basis")


def test_places_that_are_taken(tmp_path: Path) -> None:
    share = consolidate(adapters(3, 4), ShareConfig(k=SizeConfig(fixed=5)))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="it is a file"):
        write_basis(tmp_path / "file", share)
    with pytest.raises(UserError, match=r"diary\.txt"):
        write_basis(tmp_path / "folder", share)
    assert (tmp_path / "folder" / "diary.txt").read_text() == "mine"
