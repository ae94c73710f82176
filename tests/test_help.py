"""Help of the commands: ours, short, right about keys and defaults; and the list of commands."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMANDS, OPTIONS
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from varshare_rl import entry
from varshare_rl.cli import prepare
from varshare_rl.commands import report_continual, report_sharing, share
from varshare_rl.config import config_folder

PLAIN = {
    "train": "all the keys of a training run", "continual": "the same of a sequence",
    **dict.fromkeys(("evaluate", "export", "prune", "calibrate"), "typed options"),
}  # fmt: skip
#: Defaults that another choice of the group decides: env=mt10 for train, light8 for continual.
KEY = re.compile(r"^    ([a-z+][\w.]*)=(\S+)", re.MULTILINE)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["varshare", *arguments])
    entry.main()
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


CALLS = [
    *((name,) for name in entry.COMMANDS), ("report", "sharing"), ("report", "continual"), ("share", "consolidate"),
    ("share", "add"), ("share", "reconstruct"),
]  # fmt: skip


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("words", CALLS, ids="_".join)
def test_every_command_has_a_short_help_of_ours(
    words: tuple[str, ...], flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(monkeypatch, capsys, *words, flag)
    assert f"    python -m varshare_rl.{' '.join(words)} " in out
    assert "docs/" in out or f"`{words[0]} <name> --help`" in out
    assert len(out.splitlines()) <= 30
    assert all(len(line) <= 116 for line in out.splitlines())
    assert "hydra" not in out.lower()


@pytest.mark.parametrize("name", PLAIN)
def test_the_keys_and_defaults_of_a_help_are_there(name: str) -> None:
    text = entry.help_text(entry.COMMANDS[name])
    if name in ("train", "continual"):
        prepare(name, ())
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed: Any = compose(name)
    else:
        composed = OmegaConf.structured(OPTIONS[name])
    found = {key: value for key, value in KEY.findall(text) if not key.startswith("+")}
    found = {key.replace("from", "pretrained"): value for key, value in found.items()}
    assert len(found) >= 5
    for key, value in found.items():
        if value.startswith("<"):
            assert OmegaConf.is_missing(composed, key), key
            continue
        default = OmegaConf.select(composed, key, throw_on_missing=True)
        if key in ("env", "algorithm", "network", "gradient", "method"):
            chosen = {"env": ("mt10", "light8"), "gradient": ("mean",)}.get(key) or (default.name,)
            assert value in chosen
        else:
            plain = getattr(default, "value", default)
            assert OmegaConf.create([plain]) == OmegaConf.create(f"[{value}]"), key
    if name in OPTIONS:
        assert set(found) == set(OmegaConf.structured(OPTIONS[name]))


@pytest.mark.parametrize("config", [report_sharing.SharingReportConfig, report_continual.ContinualReportConfig])
def test_helps_of_reports_name_every_option(config: Any) -> None:
    keys = [key for key, _ in KEY.findall(inspect.getmodule(config).__doc__ or "")]
    assert keys == list(OmegaConf.structured(config))


def test_helps_of_share_name_real_options() -> None:
    for config, _ in share.COMMANDS.values():
        named = [key for key, _ in KEY.findall(inspect.getdoc(config) or "")]
        options: Any = OmegaConf.to_container(OmegaConf.structured(config))
        assert named
        for key in named:
            first, _, rest = key.partition(".")
            assert rest in options[first] if rest else first in options


def test_alone_it_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(monkeypatch, capsys)
    assert out == shown(monkeypatch, capsys, "--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == list(entry.COMMANDS)
    assert set(COMMANDS) < set(listed)
    assert all(len(line) < 100 for line in out.splitlines())


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        shown(monkeypatch, capsys, "trian")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: unknown command 'trian'; there is train, continual")
    assert captured.err.count("\n") == 1


def test_from_the_shell_help_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module('varshare_rl.train', run_name='__main__');"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Train one agent on many tasks.")
    listed = subprocess.run(
        [sys.executable, "-m", "varshare_rl"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "evaluate" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "env=pointmass", "--cfg", "job"), "total_transitions: 500000"),
        (("evaluate", "run=there", "--cfg", "job"), "checkpoint: last"),
        (("train", "env=pointmass", "--cfg", "hydra"), "runs/sweep_"),
    ],
)
def test_flags_of_hydra_keep_working(
    arguments: tuple[str, ...], named: str, folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert named in shown(monkeypatch, capsys, *arguments)
    assert list(folder.rglob("*")) == []
