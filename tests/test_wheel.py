"""The wheel, in a folder that has packages and files with names like ours."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import TINY, TINY_ALGORITHM

import varshare_rl

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent

SCRIPT = """
import sys
import varshare_rl as vs
assert vs.__file__.startswith(sys.argv[1]), vs.__file__
import envs.cartpole
assert envs.cartpole.MINE
agent = vs.train("cartpole", "env.envs_per_task=2", "network.hidden=[8]", total_transitions=400, run_dir="notebook",
                 algorithm={"rollout_transitions_per_task": 40}, device="cpu", log={"quiet": True})
print(type(agent.predict([0.0] * 4, agent.tasks[0])).__name__, agent.evaluate(episodes=2)["mean_return"] > 0)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a freshly built wheel is installed into."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        (source / name).write_bytes((PROJECT / name).read_bytes())
    for name in ("varshare_rl", "configs"):  # a copy: building leaves files beside the sources
        for path in (PROJECT / name).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                target = source / path.relative_to(PROJECT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "varshare_rl/configs/train.yaml" in names
    assert not [name for name in names if name.split("/")[0] in ("envs", "configs", "tests", "examples")]
    target = folder / "target"
    install = [*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of a user who has ``envs``, ``configs`` and ``tests`` of their own."""
    for package in ("envs", "configs", "tests"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "envs" / "cartpole.py").write_text("MINE = True\n")
    (tmp_path / "configs" / "train.yaml").write_text("not: ours\n")
    return tmp_path


def call(installed: Path, folder: Path, *arguments: str, script: str | None = None) -> str:
    packages = sysconfig.get_paths()["purelib"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, input=script, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), packages])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_beside_packages_of_the_same_names(installed: Path, mine: Path) -> None:
    options = [*TINY[1:], *TINY_ALGORITHM["ppo"], "total_transitions=400", "run_dir=run", "env=cartpole"]
    call(installed, mine, "-m", "varshare_rl.train", *options)
    assert (mine / "run" / "summary.json").is_file()
    assert "varshare_rl" not in (mine / "configs" / "train.yaml").read_text()
    assert call(installed, mine, "-", str(installed), script=SCRIPT).split()[-2:] == ["int", "True"]


@pytest.mark.slow
def test_the_console_script_lists_the_commands(installed: Path, mine: Path) -> None:
    out = call(installed, mine, str(installed / "bin" / "varshare"))
    assert "  train " in out
    assert "run=<folder>" in call(installed, mine, str(installed / "bin" / "varshare"), "evaluate", "--help")
