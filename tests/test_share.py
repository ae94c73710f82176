"""The command: what it writes, and what a user can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch

import varshare_rl
from varshare_rl.adapters import Adapter, LowRank, read_adapter, write_adapter
from varshare_rl.cli import errors_in_one_line
from varshare_rl.commands.share import main
from varshare_rl.transfer.share import read_basis

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


def adapter(seed: int, rank: int = 3, shared: int = 5, noise: float = 0.01, out: int = 20) -> Adapter:
    """Two layers whose corrections lie, but for some noise, in the same few directions for every seed."""
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    made: Adapter = {}
    for name in ("model.q_proj", "model.v_proj"):
        left = torch.randn(out, shared, generator=common)
        right = torch.randn(shared, 24, generator=common)
        made[name] = LowRank(
            torch.randn(rank, shared, generator=own) @ right + noise * torch.randn(rank, 24, generator=own),
            left @ torch.randn(shared, rank, generator=own),
            scale=2.0,
        )
    return made


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Adapter]:
    """Five adapters in folders, of two ranks; the current folder is the one above."""
    made = {f"task{seed}": adapter(seed, rank=2 + seed % 2) for seed in range(5)}
    for name, factors in made.items():
        write_adapter(tmp_path / "adapters" / name, factors)
    return made


@pytest.fixture
def share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str) -> Outcome:
        code: int | str | None = 0
        with chdir(tmp_path):
            try:
                with errors_in_one_line():
                    main(arguments)
            except SystemExit as stop:
                code = stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


def folders(count: int, first: int = 0) -> list[str]:
    return [f"adapters/task{index}" for index in range(first, first + count)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def worst(rebuilt: Adapter, original: Adapter) -> float:
    return max(
        float((rebuilt[name].delta() - factors.delta()).norm() / factors.delta().norm())
        for name, factors in original.items()
    )


def test_from_adapters_to_a_basis_and_back(given: dict[str, Adapter], share: Command, tmp_path: Path) -> None:
    code, out, err = share("consolidate", *folders(4), "out=made/basis", "k.max_error=0.05")
    assert (code, err) == (0, "")
    for said in (
        "model.q_proj",
        "task3",
        "worst layer",
        "bytes for 4 tasks",
        "smaller than adapters from",
        "a new task trains",
    ):
        assert said in out
    code, out, err = share("add", "basis=made/basis", "adapter=adapters/task4")
    assert (code, err) == (0, "")
    assert "projected: the basis is as it was" in out
    code, out, _ = share("add", "basis=made/basis", "adapter=adapters/task4", "name=again", "merge=always")
    assert code == 0
    assert "decomposed again" in out
    code, out, _ = share("reconstruct", "basis=made/basis", "task=task4", "out=rebuilt")
    assert code == 0
    rebuilt, info = read_adapter(tmp_path / "rebuilt")
    assert info.scale_of("model.q_proj") == 1.0
    assert 0.0 < worst(rebuilt, given["task4"]) <= 0.05
    basis = read_basis(tmp_path / "made/basis")
    assert basis.tasks == (*given, "again")
    assert basis.storage().task_bytes < basis.storage().lora_task_bytes


def test_peft_reads_what_is_rebuilt(given: dict[str, Adapter], share: Command, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    share("consolidate", *folders(5), "out=basis")
    share("reconstruct", "basis=basis", "task=task2", "out=rebuilt")
    base = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({name: torch.nn.Linear(24, 20) for name in ("q_proj", "v_proj")})}
    )
    whole = torch.nn.Module()
    whole.add_module("model", base["model"])
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "rebuilt"))
    config.inference_mode = True
    adapted = peft.PeftModel(whole, config)
    result = adapted.load_adapter(str(tmp_path / "rebuilt"), "default")
    assert not [key for key in result.missing_keys if "lora" in key]
    x, linear = torch.randn(3, 24), adapted.get_submodule("base_model.model.model.q_proj")
    expected = torch.nn.functional.linear(x, linear.base_layer.weight + given["task2"]["model.q_proj"].delta())
    torch.testing.assert_close(linear(x) - linear.base_layer.bias, expected, atol=1.0, rtol=0.05)


@pytest.mark.parametrize("method", ["share", "paper", "delta"])
def test_methods(given: dict[str, Adapter], share: Command, tmp_path: Path, method: str) -> None:
    code, _, err = share("consolidate", *folders(5), "out=basis", f"method={method}", "k.fixed=3")
    assert (code, err) == (0, "")
    basis = read_basis(tmp_path / "basis")
    assert (basis.config.method.value, {layer.k for layer in basis.layers.values()}) == (method, {3})


def test_originals_are_kept_on_request(given: dict[str, Adapter], share: Command, tmp_path: Path) -> None:
    _, out, _ = share("consolidate", *folders(5), "out=basis", "k.fixed=2", "keep_originals=true")
    assert "of originals" in out
    assert worst(read_basis(tmp_path / "basis").originals["task3"], given["task3"]) < 1e-6


WRONG = {
    "nothing": ((), "the command is nothing"),
    "unknown_command": (("unite", "adapters/task0"), "'unite'"),
    "no_out": (("consolidate", "adapters/task0"), "out is missing"),
    "no_adapters": (("consolidate", "out=basis"), "no adapters"),
    "not_an_adapter": (("consolidate", "adapters", "out=basis"), "adapters"),
    "missing_adapter": (("consolidate", "adapters/nowhere", "out=basis"), "nowhere"),
    "twice": (("consolidate", "adapters/task0", "adapters/task0", "out=basis"), "'task0'"),
    "unknown_key": (("consolidate", "adapters/task0", "out=basis", "sharing=1"), "sharing"),
    "unknown_key_of_k": (("consolidate", "adapters/task0", "out=basis", "k.most=1"), "most"),
    "unknown_method": (("consolidate", "adapters/task0", "out=basis", "method=svd"), "svd"),
    "wrong_type": (("consolidate", "adapters/task0", "out=basis", "k.fixed=few"), "few"),
    "k_is_no_number": (("consolidate", "adapters/task0", "out=basis", "k=3"), "k is a rule"),
    "two_rules": (("consolidate", "adapters/task0", "out=basis", "k.fixed=3", "k.explained=0.5"), "k.explained"),
    "impossible_error": (("consolidate", "adapters/task0", "out=basis", "k.max_error=1.5"), "k.max_error is 1.5"),
    "p_too_small": (("consolidate", "adapters/task0", "out=basis", "p=1"), "layer model.q_proj: k.max_error=0.05"),
    "p_with_delta": (("consolidate", "adapters/task0", "out=basis", "method=delta", "p=1"), "leave p out"),
    "one_basis_twice": (("consolidate", "adapters/task0", "out=made"), "made holds a basis already"),
    "out_is_a_file": (("consolidate", "adapters/task0", "out=file"), "it is a file"),
    "out_is_taken": (("consolidate", "adapters/task0", "out=adapters"), "holds other files"),
    "other_shapes": (("consolidate", "adapters/task0", "other", "out=basis"), "21 x 24"),
    "add_without_a_basis": (("add", "adapter=adapters/task4"), "basis is missing"),
    "add_to_nothing": (("add", "basis=nowhere", "adapter=adapters/task4"), "no basis.json in nowhere"),
    "add_nothing": (("add", "basis=made"), "adapter is missing"),
    "add_a_known_task": (("add", "basis=made", "adapter=adapters/task0"), "'task0' is in the basis already"),
    "add_other_shapes": (("add", "basis=made", "adapter=other"), "21 x 24"),
    "add_folders": (("add", "adapters/task3", "basis=made", "adapter=adapters/task4"), "adapters/task3"),
    "add_unknown_merge": (("add", "basis=made", "adapter=adapters/task4", "merge=maybe"), "maybe"),
    "rebuild_unknown_task": (("reconstruct", "basis=made", "task=task9", "out=rebuilt"), "unknown task 'task9'"),
    "rebuild_nothing": (("reconstruct", "basis=made", "out=rebuilt"), "task is missing"),
    "empty_name": (("add", "basis=made", "adapter=adapters/task4", "name="), "name is empty"),
    "empty_task": (("reconstruct", "basis=made", "task=", "out=rebuilt"), "task is empty"),
    "rebuild_over_an_adapter": (
        ("reconstruct", "basis=made", "task=task0", "out=adapters/task0"), "reconstruct did not write"
    ),
    "rebuild_over_a_basis": (("reconstruct", "basis=made", "task=task0", "out=made"), "holds other files"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line_and_leave_nothing(
    given: dict[str, Adapter], share: Command, tmp_path: Path, name: str
) -> None:
    write_adapter(tmp_path / "other", adapter(7, out=21))
    (tmp_path / "file").write_text("mine")
    share("consolidate", *folders(2), "out=made")
    before = snapshot(tmp_path)
    arguments, named = WRONG[name]
    code, out, err = share(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert named in err, err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "basis").exists()


HOSTILE = [
    "010", "007", "2024_01", "001", "1e3", "on", "null", "~", "{k}", "${oc.env:HOME}", "${k}", "yes", "12:30:00",
    "[bold]x", "[/]", ":smile:", "a: b", "# no", "'quoted\"", "a=b", "0x1F", " space ", "*", "&a", "!x", "ünïcode",
]  # fmt: skip


def test_names_are_taken_as_they_are_given(given: dict[str, Adapter], share: Command, tmp_path: Path) -> None:
    for folder in ("010", "2024_01", "~", "{k}", "a=b", "[bold]x"):  # as names of folders, too
        write_adapter(tmp_path / "odd" / folder, given["task0"])
    code, out, err = share(
        "consolidate", *(f"odd/{name}" for name in sorted(os.listdir(tmp_path / "odd"))), "out=010"
    )
    assert (code, err) == (0, "")
    assert "[bold]x" in out
    assert read_basis(tmp_path / "010").tasks == tuple(sorted(os.listdir(tmp_path / "odd")))
    share("consolidate", *folders(4), "out=2024_01")
    for name in HOSTILE:
        code, out, err = share("add", "basis=2024_01", "adapter=adapters/task4", f"name={name}")
        assert (code, err) == (0, ""), name
        assert name in out
    assert read_basis(tmp_path / "2024_01").tasks == (*folders_names(4), *HOSTILE)
    for place, name in enumerate(HOSTILE):
        code, out, err = share("reconstruct", "basis=2024_01", f"task={name}", f"out=made/{place}")
        assert (code, err) == (0, ""), name
        assert f"({name}, " in out
        assert worst(read_adapter(tmp_path / "made" / str(place))[0], given["task4"]) <= 0.05
    assert not (tmp_path / "202401").exists()


def folders_names(count: int) -> list[str]:
    return [folder.removeprefix("adapters/") for folder in folders(count)]


def test_reconstruct_replaces_what_it_wrote_and_keeps_a_readme(
    given: dict[str, Adapter], share: Command, tmp_path: Path
) -> None:
    share("consolidate", *folders(3), "out=basis")
    assert share("reconstruct", "basis=basis", "task=task0", "out=made")[0] == 0
    (tmp_path / "made" / "README.md").write_text("mine")
    assert share("reconstruct", "basis=basis", "task=task1", "out=made")[0] == 0
    assert (tmp_path / "made" / "README.md").read_text() == "mine"
    assert worst(read_adapter(tmp_path / "made")[0], given["task1"]) <= 0.05
    write_adapter(tmp_path / "made", given["task2"])  # trained on by the user
    code, _, err = share("reconstruct", "basis=basis", "task=task1", "out=made")
    assert code == 2
    assert "made holds an adapter that reconstruct did not write" in err
    assert worst(read_adapter(tmp_path / "made")[0], given["task2"]) == 0


def test_a_damaged_basis(given: dict[str, Adapter], share: Command, tmp_path: Path) -> None:
    share("consolidate", *folders(2), "out=made")
    file = tmp_path / "made" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    before = snapshot(tmp_path)
    for arguments in (
        ("add", "basis=made", "adapter=adapters/task4"),
        ("reconstruct", "basis=made", "task=task0", "out=x"),
    ):
        code, _, err = share(*arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert "tensors.safetensors" in err
    assert snapshot(tmp_path) == before


def test_the_same_from_the_shell(given: dict[str, Adapter], tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "varshare_rl.share", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
        )

    done = call("consolidate", *folders(5), "out=basis", "k.max_error=0.05")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "basis" / "basis.json").is_file()
    failed = call("reconstruct", "basis=basis", "task=task9", "out=rebuilt")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: unknown task 'task9'")
    assert not (tmp_path / "rebuilt").exists()


def test_adapters_of_exported_policies_are_told_apart(tmp_path: Path, share: Command) -> None:
    """Each is `<task>_peft/actor`; further networks of one of them have its name, too."""
    for seed in range(3):
        write_adapter(tmp_path / "export" / f"task{seed}_peft" / "actor", adapter(seed))
    write_adapter(tmp_path / "export" / "task0_peft" / "critic_1", adapter(7))
    actors = [f"export/task{seed}_peft/actor" for seed in range(3)]
    code, _, err = share("consolidate", *actors[:2], "out=basis")
    assert code == 0, err
    assert share("add", "basis=basis", f"adapter={actors[2]}")[0] == 0
    assert list(read_basis(tmp_path / "basis").tasks) == ["task0_peft", "task1_peft", "task2_peft"]
    code, _, err = share("consolidate", *actors, "export/task0_peft/critic_1", "out=other")
    assert code == 2
    assert "two adapters are called 'task0_peft' (export/task0_peft/critic_1)" in err
