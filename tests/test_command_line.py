"""Options that nothing would read, or that would be read in another way, are refused; numbers are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from conftest import OPTIONS, Command

import varshare_rl as vs
from varshare_rl.cli import compose
from varshare_rl.command_line import parse, read_words, whole_numbers
from varshare_rl.config import GROUPS, TrainConfig
from varshare_rl.errors import UserError

POINTMASS = ("env=pointmass", "device=cpu")
REFUSED = {
    "added_typo": (("+elbo.kl_wieght=5",), "Key 'kl_wieght' not in 'ElboConfig' (its options are kl_weight"),
    "forced_typo": (("++elbo.kl_wieght=5",), "Key 'kl_wieght' not in 'ElboConfig' (its options are kl_weight"),
    "added_to_a_component": (("+algorithm.clipp=0.1",), "Key 'clipp' not in 'PPOConfig'"),
    "added_to_the_run": (("+foo.bar=1",), "Key 'foo' not in 'TrainConfig'"),
    "target": (("+_target_=os.system",), "Key '_target_' not in 'TrainConfig'"),
    "target_inside": (("+network._target_=os.system",), "Key '_target_' not in"),
    "defaults": (("+defaults=[mt10]",), "Key 'defaults' not in 'TrainConfig'"),
    "deleted": (("~seed",), "~seed takes an option away"),
    "deleted_group": (("~critic",), "~critic takes an option away"),
    "twice": (("seed=1", "seed=2"), "seed is given twice, seed=1 and seed=2; give it once"),
    "twice_with_a_plus": (("seed=1", "++seed=2"), "seed is given twice, seed=1 and ++seed=2"),
    "group_twice": (("network=shared", "network=lora"), "network is given twice"),
    "name": (("algorithm.name=sac",), "algorithm.name=sac would keep the options of another choice; write"),
    "name_inside": (("elbo.schedule.name=ramp",), "write elbo/schedule=ramp"),
    "path": (("network=../env/mt10",), "network=../env/mt10 is a path; network takes a name"),
    "flag": (("--seed=1",), "unknown flag --seed=1; write seed=1"),
    "bare_flag": (("--quick",), "unknown flag --quick; options are written name=value"),
    "pickle": (("--experimental-rerun=config.pickle",), "unknown flag --experimental-rerun"),
    "no_folder": (("--config-dir", "nowhere"), "--config-dir 'nowhere' is no folder"),
    "half": (("total_transitions=1.5",), "1.5"),
    "both_starts": (("overwrite=true", "resume=auto"), "overwrite=true starts anew, and resume=auto goes on"),
    "show_a_sweep": (("-m", "--cfg", "job"), "--cfg shows one configuration"),
}  # fmt: skip


def assert_one_line(code: int, err: str, named: str) -> None:
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert named in err, err


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_unnoticed_is_one_line(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from varshare_rl.commands import train

    words, named = REFUSED[name]
    monkeypatch.setattr("sys.argv", ["varshare_rl.train", *POINTMASS, *words])
    with pytest.raises(SystemExit) as stop:
        train.command()
    captured = capsys.readouterr()
    assert_one_line(cast(int, stop.value.code), captured.err, named)
    assert captured.out == ""
    assert list(folder.rglob("*")) == []


def test_the_environments_name_and_path(folder: Path) -> None:
    with pytest.raises(UserError, match="write env=cartpole"):
        compose("train", ["env=pointmass", "env.name=cartpole"])
    with pytest.raises(UserError, match=r"env=\.\./env/mt10 is a path"):
        compose("train", ["env=../env/mt10"])
    with pytest.raises(UserError, match="env is given twice, env=pointmass and env=cartpole"):
        compose("train", ["env=pointmass", "env=cartpole"])


@pytest.mark.parametrize("name", [*OPTIONS, "report"])
def test_commands_without_runs_do_not_sweep(command: Command, folder: Path, name: str) -> None:
    words = ("sharing", "-m") if name == "report" else ("-m",)
    for arguments in ((*words, "run=a,b"), (*words[:-1], "run=a,b", "hydra.mode=MULTIRUN")):
        outcome = command(name, *arguments)
        shown = "report sharing" if name == "report" else name
        assert_one_line(
            outcome.code, outcome.err, f"-m sweeps over runs of train and continual, and {shown} has none"
        )
    assert list(folder.rglob("*")) == []


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    found = compose(
        "train",
        ["env=pointmass", "total_transitions=1e6", "seed=3.0", "network.hidden=[1e2,64]", "evaluate.every=2e5"],
    )
    config = cast(TrainConfig, found)
    assert (config.total_transitions, config.seed) == (1_000_000, 3)
    assert (config.network.hidden, config.evaluate.every) == ([100, 64], 200_000)
    assert compose("train", ["env=pointmass", "elbo.kl_weight=1e0"]).elbo.kl_weight == 1.0
    named = compose("train", ["env=pointmass", "run_dir='1e6'"])
    assert named.run_dir == "1e6"


def test_numbers_inside_dictionaries_of_the_user_stay(folder: Path) -> None:
    words = [
        "env=gymnasium",
        "env.ids=[Pendulum-v1]",
        "env.kwargs={Pendulum-v1: {g: 5.0}}",
        "total_transitions=1e3",
    ]
    config = compose("train", words)
    assert isinstance(config.env.kwargs["Pendulum-v1"]["g"], float)
    assert config.total_transitions == 1000


def test_python_takes_whole_floats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noted(config: TrainConfig, *rest: Any) -> Path:
        seen.append(config.total_transitions)
        raise UserError("enough")

    monkeypatch.setattr("varshare_rl.api.run_config", noted)
    with pytest.raises(UserError, match="enough"):
        vs.train("pointmass", total_transitions=2e5)
    assert seen == [200_000]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("n=1e6", "n=1000000"),
        ("n=[1e2,64,2.50]", "n=[100,64,2.50]"),
        ("n=1.5e1,2.0", "n=15,2"),
        ("n=-4.", "n=-4"),
        ("n='1e6'", "n='1e6'"),
        ("n=layer_1.0", "n=layer_1.0"),
        ("n=1e-3", "n=1e-3"),
        ("n=v1e6", "n=v1e6"),
    ],
)
def test_whole_numbers(given: str, read: str) -> None:
    assert whole_numbers(given) == read


def test_flags_and_overrides_are_parted(tmp_path: Path) -> None:
    words = read_words(["-m", "seed=1", "-cd", str(tmp_path), "hydra.mode=MULTIRUN"])
    assert (words.multirun, words.showing) == (True, [])
    assert words.overrides == ["seed=1", f"hydra.searchpath=['file://{tmp_path}']"]
    words = read_words(["--cfg", "job", "seed=1", "--info", "plugins"])
    assert (words.showing, words.overrides) == (["--cfg", "job", "--info", "plugins"], ["seed=1"])
    assert [override.value() for override in parse(["env=pointmass", "+a.b=1"], GROUPS)] == ["pointmass", 1]
