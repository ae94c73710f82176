"""What the product prints or names can be given back to it, through a shell and through Hydra."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from varshare_rl.envs.gymnasium_suite import GymnasiumConfig
from varshare_rl.overrides import literal, override, quote_names
from varshare_rl.run.loop import Run

NAMES = [
    "a=b", "a,b", "(x)", "it's", 'say "hi"', "a#b", "~x", "a;b", "{x}", "a&b", "[x]", "two  spaces", "ümlaut",
    "1e-3", "true", "Null", "a\\b", "a\\'b", "ends\\", "$HOME", "${oc.env:HOME}", "a\\${b}", "%d", "@x", "*", "?",
    "!x", "a:b", "tab\tx", "-x", "1_000", "plain-name_1.5/x", " x ", "/1e5", "./1e5", "..", ".5", "../x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_survives_shell_and_hydra(name: str) -> None:
    shell = subprocess.run(
        ["/bin/sh", "-c", f"printf %s {override('resume', name)}"], capture_output=True, text=True, check=True
    )
    assert shell.stdout == f"resume={literal(name)}"
    parsed = OverridesParser.create().parse_override(shell.stdout)
    config = OmegaConf.create({"resume": parsed.value()})
    assert config.resume == name


def test_a_plain_name_stays_plain() -> None:
    for name in ("runs/pointmass_ppo_s0_20260101-120000", "/data/runs/a", "../runs/a"):
        assert override("resume", Path(name)) == f"resume={name}"


@pytest.mark.parametrize("name", ["a=b, (c) 'd' \"e\" #f ~ ; & {g} [h]  ü", "true"])
def test_the_printed_command_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    overrides = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=320")
    with monkeypatch.context() as patched:
        plain = Run._after_step

        def stopping(run: Run) -> None:
            plain(run)
            if run.transitions == 160:
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(Run, "_after_step", stopping)
        stopped = command("train", *overrides, f"run_dir={literal(name)}")
    assert stopped.code == 143, stopped.err
    (line,) = re.findall(r"python -m varshare_rl\.train (.*)", stopped.out)
    words = subprocess.run(["/bin/sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    taken = command("train", *overrides, f"run_dir={literal(name)}")
    assert taken.code == 2
    assert f"go on with {line}, or" in taken.err
    resumed = command("train", *words.stdout.splitlines())
    assert resumed.code == 0, resumed.err
    assert (Path(name) / "summary.json").exists()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("Pendulum-v1#2", "'Pendulum-v1#2'"),
        ("[Pendulum-v1,Pendulum-v1#2,ALE/Pong-v5#13]", "[Pendulum-v1,'Pendulum-v1#2','ALE/Pong-v5#13']"),
        ("normal_left (2)", "'normal_left (2)'"),
        ("{Pendulum-v1#2: {g: 5}}", "{Pendulum-v1@2: {g: 5}}"),
        ("'Pendulum-v1#2'", "'Pendulum-v1#2'"),
        ("choice(1,2)", "choice(1,2)"),
    ],
)
def test_names_of_repeated_tasks_are_read_without_quotes(given: str, read: str) -> None:
    assert quote_names(given) == read


def test_names_that_the_product_makes_are_taken_back(command: Command) -> None:
    made = command(
        "train", *TINY, *TINY_ALGORITHM["ppo"], "env=gymnasium", "env.ids=[Pendulum-v1,Pendulum-v1]",
        "env.horizon=20", "env.kwargs={Pendulum-v1#2: {g: 5.0}}", "env.workers=1",
        "total_transitions=80", "run_dir=run",
    )  # fmt: skip
    assert made.code == 0, made.err
    done = command("export", "run=run", "task=Pendulum-v1#2", "format=torch", "out=exported")
    assert done.code == 0, done.err
    suite = GymnasiumConfig(ids=["Pendulum-v1"] * 2, kwargs={"Pendulum-v1@2": {"g": 5.0}}).build()
    assert [make().get_wrapper_attr("g") for make in suite.makers] == [10.0, 5.0]
