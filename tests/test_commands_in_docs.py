"""Every command in README and documentation runs, page by page and in order.

Whoever types them has a trained agent, three sequences of tasks and a few adapters. Budgets are tiny; else nothing
of a command is changed but the placeholders in <>.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from helpers import SEQUENCE, TINY, TINY_ALGORITHM, last_of_each

import varshare_rl
from varshare_rl import entry
from varshare_rl.cli import compose

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
#: Commands that are not run here, and why.
NOT_RUN = {
    "^make ": "sets up a virtual environment; test_targets_of_make_are_there reads them",
    "hydra/(launcher|sweeper)=": "needs an extra, and a cluster or processes of its own",
    "protocol=official": "needs an agent of Meta-World; test_official_evaluation calls it",
    "runs rm ": "asks before it removes; test_runs answers",
}
#: Suites whose environments take seconds to make, and packages of the reader: in slow tests.
DEAR = re.compile(r"metaworld|mt\d+|runs/two|cw\d+|Hopper|plugins=")
#: What stands for a placeholder, by the kind of run that a command takes.
AGENT, SEQUENCES = "runs/trained", {"a": "runs/finetune", "b": "runs/lora", "c": "runs/reference"}
#: An agent of Meta-World, for the pages that go on from one.
ARM = "runs/arm"
TASKS = {AGENT: "flipped_down", SEQUENCES["b"]: "normal_right"}
ADAPTERS = {"normal_left": "adapters/one", "normal_right": "adapters/two", "flipped_up": "another"}
#: What a run may cost, in place of what is given.
BUDGET = {
    "env.envs_per_task": "1", "evaluate.every": "0", "evaluate.episodes": "1", "checkpoint.every": "0",
    "env.workers": "0", "device": "cpu", "log.quiet": "true", "network.active_parameters": "null",
    "network.hidden": "[8]", "critic.hidden": "null", "observe.every": "0", "episodes": "2", "draws": "4",
    "total_transitions": "960",
}  # fmt: skip


def commands_of(text: str) -> list[str]:
    """Commands in blocks (indented, or fenced as a shell's) and in backticks, without comments, lines joined."""
    shell, outside, fence = [], [], None
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence in ("bash", "sh", "shell", "console") or (fence is None and line.startswith("    ")):
            shell.append(line.strip().removeprefix("$ "))
        elif fence is None:
            outside += re.findall(r"`((?:python -m varshare_rl\.\w+|varshare|make) [^`]+)`", line)
    found = [re.sub(r"\s+#.*|\s+\.\.\.$", "", line) for line in shell]
    runnable = [line for line in outside if "=" in line or line.startswith("make")]
    return [line for line in found if re.match(r"python -m varshare_rl|varshare\b|make ", line)] + runnable


def read_pages() -> dict[str, list[str]]:
    """Return the commands of every page that has some, by its path."""
    documents = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "docs").rglob("*.md"))
    paths = ["README.md", "CONTRIBUTING.md", *documents]
    found = {path: commands_of((PROJECT / path).read_text(encoding="utf-8")) for path in paths}
    return {path: commands for path, commands in found.items() if commands}


PAGES = read_pages()


def run(words: list[str]) -> None:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"varshare_rl.{words[0]}", *last_of_each(words[1:])] if words else ["varshare"])
        try:
            (import_module(entry.COMMANDS[words[0]]).command if words else entry.main)()
        except SystemExit as stop:
            if stop.code:
                raise AssertionError(f"{' '.join(words)}: {err.getvalue() or out.getvalue()}") from None


def run_with_package(page: str, words: list[str]) -> None:
    """Run a command in a process of its own, where the module is that the page shows."""
    code = (PROJECT / page).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    Path("my_package.py").write_text(code)
    command = [sys.executable, "-m", f"varshare_rl.{words[0]}", *last_of_each(words[1:])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": f"{PROJECT}:."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def words_of(line: str, page: str) -> list[str]:
    """The words of a command after ``varshare``, with placeholders filled in and patterns of files spelled out."""
    _, *words = shlex.split(re.sub(r"^python -m varshare_rl\.?", "varshare ", line))
    sequence = "continual" in words[:2] or page.endswith("continual.md")
    filled: list[str] = []
    for word in words:
        folder = SEQUENCES["b"] if sequence and not word.startswith("from=") else AGENT
        if word.startswith("from=") and "env=metaworld" in words:
            folder = ARM
        if words[:2] != ["report", "compare"]:
            word = re.sub(r"runs/<([abc])>", lambda found: SEQUENCES[found[1]], word)
        word = re.sub(r"runs/<[^>]*>", folder, word).replace("<folder>", "given")
        if "<" in line:
            word = re.sub(r"^task=(<name>|reach-v3)$", f"task={TASKS.get(folder, 'reach-v3')}", word)
        filled += sorted(glob.glob(word)) if "*" in word else [word]
    return filled


def chosen(words: list[str]) -> list[str]:
    """The overrides of a command with the first value of each that a sweep has several of."""
    options = [word for word in words if "=" in word]
    return [re.sub(r"^([^=]+=[^\[,]*),.*", r"\1", option) for option in options]


def cheaply(words: list[str]) -> list[str]:
    """The same choices with a budget of few updates; a sweep has two values of its first option, else one."""
    name, *words = words
    if name == "train" and any(word.startswith("from=runs/") for word in words):  # which has done that of BUDGET
        return [
            name,
            *(word for word in words if not word.startswith("total_transitions=")),
            "total_transitions=1280",
        ]
    if name not in ("train", "continual") or any(word.startswith(("resume=runs/", "--cfg")) for word in words):
        given = {word.partition("=")[0] for word in words} & {"episodes", "draws", "total_transitions"}
        if name == "evaluate" and not any(word.startswith("protocol=") for word in words):
            given.add("episodes")
        kept = [word for word in words if word.partition("=")[0] not in given]
        return [name, *kept, *(f"{key}={BUDGET[key]}" for key in sorted(given))]
    if any(word.startswith("plugins=") for word in words):  # composing would have this process know them
        tiny = (*TINY, *TINY_ALGORITHM["ppo"], "network.hidden=[8,8]", "total_transitions=640")
        return [name, *last_of_each((*words, *tiny))]
    config = compose(name, chosen(words))
    tasks = len(getattr(config.env, "tasks", None) or getattr(config.env, "ids", None) or range(10))
    budget = {**BUDGET, "total_transitions": str(tasks * 80)}
    budget |= dict(setting.split("=", 1) for setting in TINY_ALGORITHM[config.algorithm.name][1:])
    if name == "continual":
        budget |= dict(setting.split("=", 1) for setting in SEQUENCE[3:])
    known = {key: value for key, value in budget.items() if reaches(config, key)}
    short, several = [], 0
    for word in words:
        if word.partition("=")[0] in known:
            continue
        if chosen([word]) != [word] and word != "-m":
            several += 1
            word = ",".join(word.split(",")[: 2 if several == 1 else 1])
        short.append(word)
    return [name, *short, *(f"{key}={value}" for key, value in known.items())]


def reaches(config: object, key: str) -> bool:
    """Return True if a configuration has the option."""
    for part in key.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained agent, three sequences of tasks and adapters of other tasks."""
    desk = tmp_path_factory.mktemp("desk")
    with contextlib.chdir(desk):
        ppo = (*TINY, *TINY_ALGORITHM["ppo"])
        methods = (["method=finetune"], ["method=lora"], ["method=copies", "method.start=scratch"])
        run(["train", *last_of_each((*ppo, "total_transitions=640", "evaluate.every=320")), f"run_dir={AGENT}"])
        for folder, method in zip(SEQUENCES.values(), methods, strict=True):
            run(["continual", *last_of_each((*ppo, *SEQUENCE)), *method, f"run_dir={folder}"])
        for task, folder in ADAPTERS.items():
            run(["export", f"run={AGENT}", f"task={task}", "format=peft", f"out=exported/{task}"])
            shutil.copytree(f"exported/{task}/actor", folder)
    return desk


@pytest.fixture
def page_folder(desk: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the desk, which is the current folder."""
    shutil.copytree(desk, tmp_path / "desk")
    with contextlib.chdir(tmp_path / "desk"):
        yield Path()


def type_commands(page: str, dear: bool) -> None:
    for line in PAGES[page]:
        if skipped(line) or bool(DEAR.search(line)) != dear:
            continue
        if line.startswith("python -m varshare_rl.share add"):
            shutil.move("another", "adapters/another")  # which the basis was made without
        for word in words_of(line, page):
            if word.startswith("resume=runs/"):  # of a run that was stopped
                Path(word.removeprefix("resume="), "summary.json").unlink()
        if "plugins=" in line:
            run_with_package(page, cheaply(words_of(line, page)))
            continue
        run(cheaply(words_of(line, page)) if line != "varshare" else [])


def skipped(line: str) -> bool:
    return any(re.search(pattern, line) for pattern in NOT_RUN)


def of_kind(dear: bool) -> list[str]:
    return [
        page
        for page, lines in PAGES.items()
        if any(bool(DEAR.search(line)) == dear and not skipped(line) for line in lines)
    ]


#: Pages of cheap commands that together take long.
LONG = ("docs/continual.md", "docs/howto/table.md", "docs/howto/new_tasks.md", "docs/reports.md")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page in LONG else page for page in of_kind(dear=False)],
)
def test_cheap_commands_run(page_folder: Path, page: str) -> None:
    type_commands(page, dear=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", of_kind(dear=True))
def test_dear_commands_run(page_folder: Path, page: str) -> None:
    if any("env=metaworld" in line and "from=runs/" in line for line in PAGES[page]):
        arm = ("env=metaworld", "env.tasks=[reach-v3,push-v3]", "env.workers=1", "total_transitions=160")
        run(["train", *last_of_each((*TINY, *TINY_ALGORITHM["ppo"], *arm)), f"run_dir={ARM}"])
    type_commands(page, dear=True)


def test_dear_commands_are_composed() -> None:
    lines = {line for lines in PAGES.values() for line in lines if DEAR.search(line)}
    composed = 0
    for line in sorted(lines):
        name, *words = words_of(line, "README.md")
        if name in ("train", "continual") and "plugins=" not in line and not skipped(line):
            compose(name, chosen(words))
            composed += 1
    assert composed > 5


def test_targets_of_make_are_there() -> None:
    targets = {line.split()[1] for lines in PAGES.values() for line in lines if line.startswith("make ")}
    assert {"train", "test", "docs"} <= targets
    done = subprocess.run(["make", "-n", *sorted(targets)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_are_found_where_they_stand() -> None:
    text = (
        "    python -m varshare_rl.train a=1 \\\n        b=2      # why\n\n```bash\n$ make docs\n```\n"
        "| `python -m varshare_rl.export run=r` |\n`python -m varshare_rl.train`\n```python\n    varshare\n```\n"
    )
    found = ["python -m varshare_rl.train a=1 b=2", "make docs", "python -m varshare_rl.export run=r"]
    assert commands_of(text) == found
    words = ["train", "-m", "env=pointmass", "elbo.kl_weight=0.1,1,10", "seed=0,1"]
    assert cheaply(words)[1:5] == ["-m", "env=pointmass", "elbo.kl_weight=0.1,1", "seed=0"]
