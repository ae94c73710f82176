import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from varshare_rl.run import checkpoint
from varshare_rl.run.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from varshare_rl.types import Tree


def assert_same(got: Any, want: Any) -> None:
    """Equal in type, dtype, shape and every bit."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            assert_same(ours, theirs)
    elif isinstance(want, torch.Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert_same(as_bytes(got), as_bytes(want))
    elif isinstance(want, np.ndarray | np.generic):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes()
    elif isinstance(want, float):
        assert got.hex() == want.hex()
    else:
        assert got == want


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def base() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


shared = base()
LEAVES: dict[str, Any] = {
    "plain": [1, -(2**63), 2**64, -(2**200), True, False, None, "", "two\nlines \u00e9 \u2028", "$tensor"],
    "floats": [0.1, 1e-323, 1e308, -0.0, math.nan, math.inf, -math.inf, 1 / 3],
    "numpy scalars": [np.float32(0.1), np.float64("nan"), np.int64(-5), np.uint64(2**64 - 1), np.bool_(True)],
    "tensor dtypes": [
        torch.tensor([1.5, -0.0, math.nan, math.inf]).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    ]
    + [
        torch.tensor([0, 1, 100]).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    ],
    "array dtypes": [
        np.array([0, 1, 250], dtype=dtype)
        for dtype in ("bool", "uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64")
    ]
    + [np.array([1.5, -0.0, np.nan], dtype=dtype) for dtype in ("float16", "float32", "float64")],
    "large integers": [np.array([2**64 - 1], dtype=np.uint64), torch.tensor([-(2**63)])],
    "shapes": [
        torch.tensor(3.0),
        torch.empty(0),
        torch.empty(0, 3),
        np.array(3.0),
        np.empty((2, 0), np.uint8),
    ],
    "views": [base().T, base()[1:3], base()[:, ::2], base()[0].expand(3, 6), np.arange(9)[::-2], np.eye(3).T],
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "read only": read_only(np.arange(3)),
    "shared memory": {"whole": shared, "again": shared, "part": shared[1:], "array": shared.numpy()},
    "int keys": {0: {"step": torch.tensor(1.0)}, 1: {}, "1": "a string", -3: [2**70]},
    "odd keys": {
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "": 1,
        "$tensor": 2,
        "__metadata__": base(),
    },
    "nodes": [{}, [], (), {"$float": "nan"}, {"$tensor": torch.zeros(1)}, [[], [{}]], (1, (2.0, [3]))],
}


@pytest.mark.parametrize("name", LEAVES)
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    tree = {name: LEAVES[name]}
    assert_same(load_checkpoint(save_checkpoint(tmp_path, "last", 1, tree)), tree)


def test_reserved_name_of_the_file_format_can_be_a_key(tmp_path: Path) -> None:
    tree = {"__metadata__": torch.ones(2)}
    assert_same(load_checkpoint(save_checkpoint(tmp_path, "last", 1, tree)), tree)


def test_parameters_come_back_as_tensors_without_gradient(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    loaded = load_checkpoint(save_checkpoint(tmp_path, "last", 1, {"theta": parameter}))["theta"]
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad


def test_loaded_arrays_can_be_written_and_outlive_the_files(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "last", 1, {"t": torch.zeros(4), "n": np.zeros(4)})
    loaded = load_checkpoint(path)
    loaded["t"] += 1
    loaded["n"] += 1
    assert_same(load_checkpoint(path)["t"], torch.zeros(4))  # the file did not change
    shutil.rmtree(path)
    assert loaded["t"].sum() + loaded["n"].sum() == 8


def test_adam_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def step(layer: torch.nn.Linear, optimiser: torch.optim.Adam) -> None:
        optimiser.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()

    layer, optimiser = make()
    step(layer, optimiser)
    path = save_checkpoint(tmp_path, "last", 1, {"net": layer.state_dict(), "adam": optimiser.state_dict()})
    step(layer, optimiser)
    other, other_optimiser = make()
    tree = load_checkpoint(path)
    other.load_state_dict(tree["net"])
    other_optimiser.load_state_dict(tree["adam"])
    step(other, other_optimiser)
    assert_same(other.weight.detach(), layer.weight.detach())


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (object(), "a object"),
        ({1, 2}, "a set"),
        (1j, "a complex"),
        (np.array(["text"]), "an array of <U4"),
        (np.array([None]), "an array of object"),
        (np.arange(3, dtype=">i4"), "an array of >i4"),
        ({2.5: 1}, "the key 2.5"),
        ({True: 1}, "the key True"),
    ],
)
def test_what_it_cannot_hold_is_named_before_anything_is_written(leaf: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"cannot hold {words} \(at 'a\.b\.0'\)"):
        save_checkpoint(tmp_path, "last", 1, {"a": {"b": [leaf]}})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_one_of_each_kind_stays(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "last", 10, {"n": 10})
    save_checkpoint(tmp_path, "best", 10, {"n": 11})
    path = save_checkpoint(tmp_path, "last", 2_000, {"n": 2_000})
    names = sorted(item.name for item in (tmp_path / "checkpoints").iterdir())
    assert names == ["best-000000000010", "last-000000002000"]
    assert sorted(item.name for item in path.iterdir()) == ["state.json", "tensors.safetensors"]
    assert find_checkpoint(tmp_path) == path
    assert load_checkpoint(find_checkpoint(tmp_path, "best")) == {"n": 11}


def test_the_state_file_can_be_read_by_people(tmp_path: Path) -> None:
    tree = {"counters": {"updates": 3}, "actor": {"theta": torch.zeros(2)}}
    document = json.loads((save_checkpoint(tmp_path, "last", 7, tree) / "state.json").read_text())
    assert document["format_version"] == 1
    assert document["transitions"] == 7
    assert document["tree"] == {"counters": {"updates": 3}, "actor": {"theta": {"$tensor": "actor.theta"}}}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code handles it."""


DISK_STEPS = [
    (checkpoint, "save_file"),
    (checkpoint, "_size_and_digest"),
    (checkpoint, "write_atomically"),
    (checkpoint, "sync_folder"),
    (shutil, "rmtree"),
    (Path, "rename"),
    (Path, "mkdir"),
]


def kill_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the ``call``-th step on the disk from now on the last: it is not done, nor is any after it."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= call:
                raise Killed
            return original(*arguments, **options)

        return run

    for owner, name in DISK_STEPS:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("transitions", [1, 2])  # the same name again, and a new one
def test_killed_at_any_step_a_complete_checkpoint_stays(
    transitions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = False
    for call in range(1, 50):
        run_dir = tmp_path / str(call)
        save_checkpoint(run_dir, "last", 1, {"x": torch.zeros(5), "n": 0})
        with monkeypatch.context() as patch:
            kill_at(call, patch)
            try:
                save_checkpoint(run_dir, "last", transitions, {"x": torch.ones(5), "n": 1})
                finished = True
            except Killed:
                pass
        tree = load_checkpoint(find_checkpoint(run_dir))
        assert_same(tree, {"x": torch.full((5,), float(tree["n"])), "n": tree["n"]})
        save_checkpoint(run_dir, "last", 3, {"n": 3})  # goes on, and clears up
        assert [item.name for item in (run_dir / "checkpoints").iterdir()] == ["last-000000000003"]
        if finished:
            break
    assert finished
    assert call > 8  # it was killed at each of the steps before


def test_kill_9_in_the_middle_of_a_save(tmp_path: Path) -> None:
    program = """
import sys, time, torch
from pathlib import Path
from varshare_rl.run import checkpoint
run_dir = Path(sys.argv[1])
checkpoint.save_checkpoint(run_dir, "last", 1, {"x": torch.ones(1000)})
whole = checkpoint.save_file
def half(tensors, path):
    whole(tensors, path)
    path.write_bytes(path.read_bytes()[:2000])
    print("half", flush=True)
    time.sleep(60)
checkpoint.save_file = half
checkpoint.save_checkpoint(run_dir, "last", 2, {"x": torch.zeros(1000)})
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the checkpoint, and half of another
    path = find_checkpoint(tmp_path)
    assert path.name == "last-000000000001"
    assert_same(load_checkpoint(path), {"x": torch.ones(1000)})
    save_checkpoint(tmp_path, "last", 2, {"x": torch.zeros(1)})
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["last-000000000002"]


def truncate(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def edit_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((path / "state.json").read_text())
    change(document)
    (path / "state.json").write_text(json.dumps(document))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated tensors": (
        truncate,
        r"damaged checkpoint file '.*tensors.safetensors': \d+ bytes instead of \d+",
    ),
    "flipped tensor byte": (
        lambda path: flip(path / "tensors.safetensors", -1),
        r"damaged checkpoint file '.*tensors.safetensors': its content was changed",
    ),
    "flipped header byte": (
        lambda path: flip(path / "tensors.safetensors", 12),
        r"damaged checkpoint file '.*tensors.safetensors': its content was changed",
    ),
    "no tensors": (
        lambda path: (path / "tensors.safetensors").unlink(),
        r"'.*tensors.safetensors' is missing",
    ),
    "no state": (lambda path: (path / "state.json").unlink(), r"'.*state.json' is missing"),
    "empty state": (
        lambda path: (path / "state.json").write_text(""),
        r"damaged checkpoint: cannot read .*state.json: ",
    ),
    "garbled state": (
        lambda path: (path / "state.json").write_bytes(b"\xff\xfe{]"),
        r"damaged checkpoint: cannot read .*state.json: ",
    ),
    "state is a list": (lambda path: (path / "state.json").write_text("[]"), r"damaged .*state.json: "),
    "changed number": (
        lambda path: edit_state(path, lambda document: document["tree"].update(n=3)),
        r"damaged checkpoint file '.*state.json': its content was changed",
    ),
    "unknown version": (
        lambda path: edit_state(path, lambda document: document.update(format_version=99)),
        r"has format version 99: this version of varshare_rl reads version 1",
    ),
    "gone": (shutil.rmtree, r"no checkpoint '.*last-000000000020'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_that_names_the_file(damage: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "last", 20, {"x": torch.ones(4), "n": 2})
    hurt, words = DAMAGE[damage]
    hurt(path)
    with pytest.raises(CheckpointError, match=words + r".*; no other complete one is there") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_damage_names_another_complete_checkpoint_and_how_to_use_it(tmp_path: Path) -> None:
    trees: list[Tree] = [{"x": torch.ones(4), "n": number} for number in range(4)]
    best = save_checkpoint(tmp_path, "best", 10, trees[0])
    damaged_too = save_checkpoint(tmp_path, "spare", 15, trees[1])
    newest = save_checkpoint(tmp_path, "last", 20, trees[2])
    truncate(newest)
    truncate(damaged_too)
    with pytest.raises(CheckpointError, match=rf"'{best}' is complete: evaluate takes it as checkpoint=best"):
        load_checkpoint(find_checkpoint(tmp_path))
    assert load_checkpoint(find_checkpoint(tmp_path, "best"))["n"] == 0  # the advice works


def test_damage_names_an_older_checkpoint_of_the_same_kind(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, "last", 10, {"n": 1})
    kept = older.with_name("kept")
    shutil.copytree(older, kept)
    newest = save_checkpoint(tmp_path, "last", 20, {"n": 2})
    kept.rename(older)  # as after an interruption before the older one was removed
    (newest / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"'{older}' is complete: remove the damaged folder to use it"):
        load_checkpoint(find_checkpoint(tmp_path))
    shutil.rmtree(newest)
    assert load_checkpoint(find_checkpoint(tmp_path))["n"] == 1


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run folder '.*absent'"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no 'last' checkpoint in '.*checkpoints': .* start it anew"):
        find_checkpoint(tmp_path)
    best = save_checkpoint(tmp_path, "best", 5, {})
    with pytest.raises(
        CheckpointError, match=rf"no 'last' checkpoint in .*: there is '{best}', which evaluate takes"
    ):
        find_checkpoint(tmp_path)


def test_the_newest_stay_and_the_one_before_serves_where_the_newest_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (10, 20, 30):
        save_checkpoint(tmp_path, "last", number, {"n": number}, keep=2)
    save_checkpoint(tmp_path, "best", 10, {"n": 0})
    assert names(tmp_path) == ["best-000000000010", "last-000000000020", "last-000000000030"]
    assert newest_checkpoint(tmp_path)[1] == {"n": 30}
    truncate(tmp_path / "checkpoints" / "last-000000000030")
    path, tree = newest_checkpoint(tmp_path)
    assert (path.name, tree) == ("last-000000000020", {"n": 20})
    assert capsys.readouterr().err.startswith("warning: damaged checkpoint file")
    save_checkpoint(tmp_path, "last", 25, {"n": 25}, keep=2)  # what went on from there has another future
    assert names(tmp_path) == ["best-000000000010", "last-000000000020", "last-000000000025"]
    for name in ("last-000000000020", "last-000000000025"):
        truncate(tmp_path / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=r"last-000000000025.*best-000000000010' is complete"):
        newest_checkpoint(tmp_path)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())
