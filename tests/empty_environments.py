"""The wheel in empty environments: it trains and evaluates with the versions that pyproject.toml allows.

    python tests/empty_environments.py                    # tested, oldest and newest
    python tests/empty_environments.py oldest

``tested`` has the versions of constraints.txt, ``oldest`` the lower bounds of the dependencies, ``newest`` whatever
pip takes; torch is that of constraints.txt in all of them, as pip's own choice brings gigabytes of CUDA. Builds
``dist/*.whl``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent
KINDS = ("tested", "oldest", "newest")
METAWORLD = ("env=metaworld", "env.tasks=[reach-v3,push-v3]", "env.envs_per_task=2", "env.workers=1")
COMMANDS = (
    ("train", "env=pointmass", "total_transitions=20000", "run_dir=points"),
    ("train", "env=lunarlander", "env.envs_per_task=4", "total_transitions=20000", "run_dir=lander"),
    ("train", *METAWORLD, "total_transitions=10000", "evaluate.every=0", "evaluate.episodes=1", "run_dir=arm"),
    ("evaluate", "run=points", "episodes=4"),
    ("train", "resume=points", "total_transitions=30000"),
    ("report", "sharing", "run=points"),
    ("train", "-m", "env=cartpole", "total_transitions=4000", "seed=0,1"),
)


def requirements() -> list[Requirement]:
    """Return the dependencies of the wheel."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def constraints(kind: str) -> str:
    """Return the text of a file of constraints."""
    tested = (PROJECT / "constraints.txt").read_text()
    if kind == "tested":
        return tested
    lines = [line for line in tested.splitlines() if line.startswith("torch==")]
    for needed in requirements() if kind == "oldest" else []:
        lowest = [bound.version for bound in needed.specifier if bound.operator == ">="]
        if lowest and needed.name != "torch":
            lines.append(f"{needed.name}=={lowest[0]}")
    return "\n".join(lines) + "\n"


def build() -> Path:
    """Build the wheel anew."""
    for leftover in (PROJECT / "build", PROJECT / "dist"):
        shutil.rmtree(leftover, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", "dist", "."], cwd=PROJECT, check=True)
    (wheel,) = (PROJECT / "dist").glob("*.whl")
    return wheel


def attempt(kind: str, wheel: Path, folder: Path) -> None:
    """Install into an environment of its own and type the commands, in a folder without the project."""
    bounds = folder / "constraints.txt"
    bounds.write_text(constraints(kind))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    binaries = folder / "venv" / "bin"
    pip = [binaries / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "-c", bounds, wheel], check=True)
    subprocess.run([*pip, "check"], check=True)
    names = [needed.name for needed in requirements()]
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    chosen = [line for line in listed.splitlines() if line.partition("==")[0].lower() in names]
    print(f"{kind}: {', '.join(chosen)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in COMMANDS:
        print(f"{kind}: varshare {' '.join(command)}", flush=True)
        quiet = ("log.quiet=true",) if command[0] == "train" else ()
        subprocess.run(
            [binaries / "varshare", *command, *quiet],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def main() -> None:
    """Try the kinds that are named."""
    kinds = sys.argv[1:] or KINDS
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        sys.exit(f"unknown {unknown[0]!r}: choose from {', '.join(KINDS)}")
    wheel = build()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                attempt(kind, wheel, Path(folder))
            except subprocess.CalledProcessError as error:
                sys.exit(f"{kind}: {' '.join(map(str, error.cmd))} ends with {error.returncode}")
    print(f"{wheel.relative_to(PROJECT)} trains and evaluates with: {', '.join(kinds)}")


if __name__ == "__main__":
    main()
