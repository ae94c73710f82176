"""Run folders, adapters and bases of somebody else: opening them runs, follows, looks up and unfolds nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
import yaml
from conftest import Command, Outcome
from helpers import TINY, TINY_ALGORITHM

from varshare_rl.adapters import read_adapter, write_adapter
from varshare_rl.adapters.adapter import LowRank, describe
from varshare_rl.errors import UserError
from varshare_rl.reading import MOST_YAML_BYTES, check_pattern, read_json, read_yaml
from varshare_rl.transfer.share.config import ShareConfig
from varshare_rl.transfer.share.folder import _digest, read_basis, write_basis
from varshare_rl.transfer.share.model import consolidate

RUN = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160", "run_dir=run")
PAYLOAD = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
open("ran", "w").close()
gymnasium.registry.pop("Payload-v0", None)
gymnasium.register("Payload-v0", PendulumEnv, max_episode_steps=20)
class Wrapper(gymnasium.Wrapper):
    pass
"""
#: Every command that opens the folder of a run.
OPENING: dict[str, tuple[str, ...]] = {
    "train": ("resume=run", "total_transitions=320"),
    "evaluate": ("run=run", "episodes=1"),
    "export": ("run=run", "task=all", "format=torch"),
    "prune": ("run=run",),
    "calibrate": ("run=run",),
}


@pytest.fixture
def payload(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in the current folder that leaves a file behind when it is imported."""
    (folder / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(str(folder))
    yield folder / "ran"
    sys.modules.pop("payload", None)
    gymnasium.registry.pop("Payload-v0", None)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    stored = yaml.safe_load(path.read_text())
    change(stored)
    path.write_text(yaml.safe_dump(stored))


def refused(outcome: Outcome, words: str) -> None:
    assert outcome.code == 2
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert len(lines[0]) < 600


def gymnasium_env(**options: Any) -> dict[str, Any]:
    return {"name": "gymnasium", "ids": ["Pendulum-v1"], "envs_per_task": 2, "workers": 1, "horizon": 20} | options


@pytest.mark.parametrize(
    "env",
    [
        gymnasium_env(ids=["payload:Payload-v0"]),
        gymnasium_env(wrappers=["payload:Wrapper"]),
        gymnasium_env(wrappers=["subprocess:run"]),
        None,
    ],
    ids=["id", "wrapper", "standard library", "plugins"],
)
def test_a_configuration_imports_no_module(
    command: Command, command_once: Callable[..., Path], payload: Path, env: dict[str, Any] | None
) -> None:
    run = command_once("train", *RUN)
    edit(
        run / "config.yaml", lambda stored: stored.update({"plugins": ["payload"]} if env is None else {"env": env})
    )
    for name in OPENING if env is None else ("evaluate",):
        refused(command(name, *OPENING[name]), "made with modules that run code of their own")
        assert not payload.exists()
    assert "payload" not in sys.modules


def test_a_module_that_the_user_names_is_imported(command: Command, payload: Path) -> None:
    run = (*TINY[1:], *TINY_ALGORITHM["ppo"], "env=gymnasium", "env.horizon=20", "total_transitions=160")
    made = command("train", *run, "env.ids=[payload:Payload-v0]", "run_dir=run")
    assert (made.code, payload.exists()) == (0, True), made.err
    del sys.modules["payload"]
    payload.unlink()
    outcome = command("evaluate", "run=run", "episodes=1")
    refused(outcome, "give plugins=[payload] to load them")
    assert not payload.exists()
    assert command("evaluate", "run=run", "episodes=1", "plugins=[payload]").code == 0


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


BAD_YAML = {
    "bomb": (bomb(), "has aliases"),
    "secret": ("device: ${oc.env:SECRET}", "is to be looked up"),
    "secret in a key": ("${oc.env:SECRET}: 1", "is to be looked up"),
    "deep": ("[" * 3000 + "]" * 3000, "more than 50 levels"),
    "large": ("# " + "x" * MOST_YAML_BYTES, "at most 2,097,152 are read"),
    "not text": (b"\xff\xfe\x00", "UnicodeDecodeError"),
    "python": ("!!python/object/apply:os.system ['touch ran']", "ConstructorError"),
    "digits": ("seed: " + "9" * 5000, "it is damaged"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_configurations_that_are_traps(
    command: Command, command_once: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SECRET", "tell no one")
    run = command_once("train", *RUN)
    content, words = BAD_YAML[kind]
    (run / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in OPENING if kind == "secret" else ("evaluate",):
        outcome = command(name, *OPENING[name])
        refused(outcome, words)
        assert "tell no one" not in outcome.err


def test_pipes_and_links_out_of_a_folder(command: Command, command_once: Callable[..., Path], folder: Path) -> None:
    """A pipe would be waited for; through a link a file elsewhere would be written, cut or deleted."""
    precious = folder / "precious"
    precious.mkdir()
    (precious / "file").write_text("dear")

    def pipe(run: Path) -> None:
        (run / "config.yaml").unlink()
        os.mkfifo(run / "config.yaml")

    traps: dict[str, Callable[[Path], None]] = {
        "is neither a file nor a folder": pipe,
        "metrics.jsonl is a link out of run": lambda run: relink(run / "metrics.jsonl", precious / "file"),
        ".lock is a link out of run": lambda run: relink(run / ".lock", precious / "file"),
        "old is a link out of run": lambda run: relink(run / "checkpoints" / "old", precious),
    }
    for words, trap in traps.items():
        run = command_once("train", *RUN)
        trap(run)
        for name in ("train", "evaluate"):
            refused(command(name, *OPENING[name]), words)
        assert (precious / "file").read_text() == "dear"
        run.rename(folder / f"run-{len(words)}")
    run = command_once("train", *RUN)
    (folder / "linked").symlink_to(run)  # the folder itself may be a link, and links inside lead nowhere else
    (run / "own").symlink_to("metrics.jsonl")
    assert command("evaluate", "run=linked", "episodes=1").code == 0


def relink(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# adapters and bases


def adapter(folder: Path) -> Path:
    made = {"layer": LowRank(torch.randn(2, 4), torch.randn(3, 2))}
    write_adapter(folder, made, describe(made))
    return folder


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(.*)*x", ".*.*.*.*.*x", "(a{1,50}){1,50}", "(" * 500])
def test_a_pattern_that_would_be_matched_for_ever_is_refused(pattern: str, tmp_path: Path) -> None:
    file = adapter(tmp_path / "adapter") / "adapter_config.json"
    for key, value in (("rank_pattern", {pattern: 2}), ("target_modules", pattern)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(UserError, match=r"adapter_config.json.*(could take for ever|no regular expression)"):
            read_adapter(file.parent)


def test_patterns_of_people_are_taken() -> None:
    for pattern in (r"^layers\.0$", r".*\.(q_proj|v_proj)$", r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k)_proj"):
        check_pattern(pattern)


def test_deep_json_is_one_line(tmp_path: Path) -> None:
    for start in ("[", '{"a":'):
        file = tmp_path / "deep.json"
        file.write_text(start * 100_000)
        with pytest.raises(UserError, match=r"cannot read .*deep\.json: RecursionError"):
            read_json(file)


def test_a_basis_names_no_other_files_and_looks_nothing_up(tmp_path: Path) -> None:
    folder = tmp_path / "basis"
    tasks = {name: {"layer": LowRank(torch.randn(2, 4), torch.randn(3, 2))} for name in ("one", "two")}
    write_basis(folder, consolidate(tasks, ShareConfig()))
    assert read_basis(folder).tasks == ("one", "two")
    (tmp_path / "secret").write_text("dear")
    document = json.loads((folder / "basis.json").read_text())

    def write(**changes: Any) -> None:
        changed = {**document, **changes}
        changed.pop("sha256")
        (folder / "basis.json").write_text(json.dumps({**changed, "sha256": _digest(changed)}))

    write(options=document["options"] | {"method": "${oc.env:HOME}"})
    with pytest.raises(UserError, match="looked up"):
        read_basis(folder)
    write(files=document["files"] | {"../secret": {"bytes": 4, "sha256": ""}})
    assert read_basis(folder).tasks == ("one", "two")  # never opened
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="link is a link out of"):
        read_basis(folder)


def test_yaml_keeps_the_values_that_omegaconf_has(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("rate: 1e-3\nname: 007x\nempty: null\nlist: [1, true]\n")
    assert dict(read_yaml(file)) == {"rate": 1e-3, "name": "007x", "empty": None, "list": [1, True]}
    file.write_text("")
    assert dict(read_yaml(file)) == {}
