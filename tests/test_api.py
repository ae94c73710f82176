"""The Python door: the same runs as the commands', environments of the user's own, and what an agent can do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Command
from helpers import SEQUENCE, TINY, TINY_ALGORITHM
from hydra.core.global_hydra import GlobalHydra
from test_errors import WITHOUT_RUN, assert_one_line

import varshare_rl as vs
from varshare_rl.api import to_overrides
from varshare_rl.overrides import literal
from varshare_rl.run.loop import Run
from varshare_rl.run.signals import Interrupted

PPO = (*TINY[1:], *TINY_ALGORITHM["ppo"])


class Line(gymnasium.Env[Any, Any]):
    """A point on a line; ``extra`` numbers are observed and acted on that do nothing."""

    def __init__(self, goal: float, extra: int = 0, low: float = -2.0, high: float = 3.0) -> None:
        self.goal = goal
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2 + extra,), np.float32)
        self.action_space = gymnasium.spaces.Box(low, high, (1 + extra,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = float(self.np_random.normal())
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.x += 0.1 * float(action[0])
        return self._seen(), -abs(self.x - self.goal), False, False, {}

    def _seen(self) -> Any:
        seen = np.zeros(self.observation_space.shape, np.float32)
        seen[:2] = self.x, self.goal
        return seen


class Choices(Line):
    """A line with choices whose numbers begin at 5."""

    def __init__(self, goal: float, choices: int) -> None:
        super().__init__(goal)
        self.action_space: Any = gymnasium.spaces.Discrete(choices, start=5)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return super()._seen(), 0.0, False, False, {}


ENVS: dict[str, Callable[[], Any]] = {"left": lambda: Line(-1.0), "right": lambda: Line(1.0, extra=2)}
OWN: dict[str, Any] = {
    "env": {"horizon": 20, "envs_per_task": 2},
    "network": {"hidden": [8]},
    "algorithm": {"name": "ppo", "rollout_transitions_per_task": 40, "epochs": 2, "minibatches": 2},
    "evaluate": {"every": 0, "episodes": 2},
    "log": {"quiet": True},
    "total_transitions": 160,
    "device": "cpu",
}


@pytest.fixture
def own(folder: Path) -> vs.Agent:
    return vs.train(envs=ENVS, run_dir="run", **OWN)


def test_importing_the_package_is_light() -> None:
    light = "import sys, varshare_rl as vs; vs.UserError; vs.__version__; print('torch' in sys.modules, dir(vs))"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
    with pytest.raises(AttributeError, match="no_such_name"):
        vs.no_such_name  # noqa: B018


def test_importing_the_module_of_the_command_leaves_the_function() -> None:
    code = "import varshare_rl as vs, varshare_rl.train; print(vs.train.__qualname__, vs.train.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["train", "varshare_rl.api"]


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(entry) for key, entry in value.items() if "second" not in key}
    return value


def test_a_run_is_the_same_as_the_commands(command: Command, folder: Path) -> None:
    agent = vs.train(
        "pointmass", *PPO, total_transitions=640, run_dir="door", elbo={"kl_weight": 0.5}, seed=3,
        gradient={"actor": "mean"}, network={"name": "varshare_lora", "rank": 2},
    )  # fmt: skip
    same = ("total_transitions=640", "elbo.kl_weight=0.5", "seed=3", "network.rank=2")
    outcome = command("train", *TINY, *TINY_ALGORITHM["ppo"], *same, "run_dir=command")
    assert outcome.code == 0, outcome.err
    theirs = json.loads(Path("command/summary.json").read_text())
    assert without_clock(agent.results) == without_clock(theirs)
    ours, others = ({path.name.partition(".")[0] for path in Path(run).iterdir()} for run in ("door", "command"))
    assert ours == others
    config = Path("door/config.yaml").read_text()
    assert config.replace("run_dir: door", "run_dir: command") == Path("command/config.yaml").read_text()
    assert agent.config.elbo.kl_weight == 0.5
    assert agent.run_dir == Path("door")
    assert len(agent.tasks) == 8
    assert "pointmass ppo varshare_lora" in repr(agent)


def test_a_run_gets_a_name_and_goes_on(folder: Path) -> None:
    agent = vs.train("pointmass", *PPO, total_transitions=160)
    assert agent.run_dir.parent == Path("runs")
    assert agent.run_dir.name.startswith("pointmass_ppo_varshare_lora_s0_")
    more = vs.train(resume=agent.run_dir, total_transitions=320)
    assert (more.run_dir, more.results["transitions"]) == (agent.run_dir, 320)
    with pytest.raises(vs.UserError, match=r"seed=1 cannot be changed when a run is resumed"):
        vs.train(resume=agent.run_dir, total_transitions=480, seed=1)
    with pytest.raises(vs.UserError, match=r"soon"):
        vs.train(resume=agent.run_dir, total_transitions="soon")


def test_a_run_that_is_interrupted_can_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(run: Run) -> None:
        run.save("last")
        raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            vs.train("pointmass", *PPO, total_transitions=160, run_dir="run")
    with pytest.raises(vs.UserError, match=r"no summary.json yet"):
        vs.load("run").results  # noqa: B018
    assert vs.train(resume="run", device="cpu").results["transitions"] == 160


@pytest.mark.parametrize(
    "name",
    [
        "unknown_key", "no_whole_number", "not_an_override", "broken_syntax", "unknown_env", "unknown_schedule",
        "group_by_a_switch", "no_budget", "unknown_pointmass_task", "unknown_activation", "empty_run_dir",
    ],
)  # fmt: skip
def test_errors_are_those_of_the_command(command: Command, folder: Path, name: str) -> None:
    arguments, named = WITHOUT_RUN[name]
    with pytest.raises(vs.UserError) as error:
        vs.train(*arguments, device="cpu")
    outcome = command("train", *arguments, "device=cpu")
    assert_one_line(outcome.code, outcome.err, named)
    assert outcome.err == f"error: {' '.join(str(error.value).split())}\n"
    assert list(folder.rglob("*")) == []


def test_hydra_is_left_as_it_was(folder: Path) -> None:
    theirs: Any = GlobalHydra.instance()
    theirs.hydra = mine = object()
    try:
        with pytest.raises(vs.UserError):
            vs.train("nowhere")
        assert GlobalHydra.instance() is theirs
        assert theirs.hydra is mine
    finally:
        theirs.clear()


def test_options_are_overrides() -> None:
    flat = {"algorithm": "sac", "seed": 3, "device": None}
    assert to_overrides(flat) == ["algorithm=sac", "seed=3", "device=null"]
    nested = {"elbo": {"kl_weight": 1e-5, "schedule": {"name": "ramp", "late": 0.1}, "prior": "learned"}}
    assert to_overrides(nested) == [
        "elbo.kl_weight=1e-05", "elbo/schedule=ramp", "elbo.schedule.late=0.1", "elbo/prior=learned",
    ]  # fmt: skip
    assert to_overrides({"optimizer": {"schedule": "cosine"}}) == ["optimizer.schedule=cosine"]
    assert to_overrides({"experiment": "toppo_mt10", "tuned": None}) == ["+experiment=toppo_mt10", "tuned=null"]
    assert to_overrides({"env": {"ids": ("A-v1", "B-v1")}}) == ["env.ids=[A-v1,B-v1]"]
    assert literal(True) == "true"
    assert literal({"a": [1, None]}) == "{a:[1,null]}"


@pytest.mark.parametrize(
    "text", ["plain", "it's", "a\\", "a\\'b", "x=1,y", "10", "null", "Off", "", "runs/a_b-1", "a b/ü"]
)
def test_words_come_through_the_command_line_as_they_are(text: str) -> None:
    from varshare_rl.api import compose

    assert compose("train", to_overrides({"run_dir": text})).run_dir == text


def test_own_environments_make_a_run_folder(own: vs.Agent) -> None:
    assert own.tasks == ("left", "right")
    assert own.config.env.name == "objects"
    assert own.config.env.tasks == ["left", "right"]
    assert own.results["conditions"]["suite"] == "objects"
    more = vs.train(envs=ENVS, resume="run", total_transitions=320)
    assert more.results["transitions"] == 320


def test_predictions_need_no_environments_and_evaluations_do(own: vs.Agent, command: Command) -> None:
    loaded, obs = vs.load("run"), np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(loaded.predict(obs, "right"), own.predict(obs, "right"))
    with pytest.raises(vs.UserError, match=r"Python objects.*vs\.load\(folder, envs="):
        loaded.evaluate(episodes=1)
    outcome = command("evaluate", "run=run")
    assert_one_line(outcome.code, outcome.err, "vs.load(folder, envs=")
    outcome = command("train", "resume=run", "total_transitions=640")
    assert_one_line(outcome.code, outcome.err, "Python objects")
    assert command("report", "sharing", "run=run").code == 0
    found = vs.load("run", envs=ENVS, device="cpu").evaluate(episodes=2)
    assert found["tasks"] == own.results["tasks"]
    assert json.loads(Path("run/evaluation.json").read_text())["tasks"] == found["tasks"]


def test_actions_are_the_environments_own(own: vs.Agent) -> None:
    for task, extra in (("left", 0), ("right", 2)):
        env = Line(0.0, extra)
        batch = np.stack([env.observation_space.sample() * 5 for _ in range(6)])
        actions = own.predict(batch, task)
        assert actions.shape == (6, 1 + extra)
        assert all(env.action_space.contains(action) for action in actions)
        np.testing.assert_allclose(own.predict(batch[2], task), actions[2], rtol=1e-5)
        assert own.predict(torch.from_numpy(batch[2]), task).shape == (1 + extra,)
        drawn = own.predict(batch, task, deterministic=False)
        assert not np.array_equal(drawn, actions)
        assert all(env.action_space.contains(action) for action in drawn)


def test_choices_are_integers_of_the_environment(folder: Path) -> None:
    envs: dict[str, Any] = {"two": lambda: Choices(0.0, 2), "four": lambda: Choices(0.0, 4)}
    agent = vs.train(envs=envs, run_dir="run", **OWN)
    action = agent.predict(np.zeros(2), "two")
    assert isinstance(action, int)
    assert action in (5, 6)
    drawn = agent.predict(np.zeros((200, 2)), "four", deterministic=False)
    assert set(drawn.tolist()) == {5, 6, 7, 8}


@pytest.mark.parametrize("network", ["varshare_lora", "varshare", "shared", "moore", "multi_head", "care"])
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_predictions_are_the_actions_of_evaluation(folder: Path, algorithm: str, network: str) -> None:
    options = (*TINY[1:], *TINY_ALGORITHM[algorithm], "algorithm.normalize_observations=true")
    agent = vs.train("pointmass", *options, network=network, total_transitions=480, run_dir="run")
    trained: Any = agent._trained
    obs = torch.randn(8, 5, 4)
    actions = trained.algorithm.evaluation_policy(5).act(obs).numpy()
    for index, task in enumerate(agent.tasks):
        np.testing.assert_allclose(agent.predict(obs[index].numpy(), task), actions[index], atol=2e-6)


def test_wrong_requests_are_one_line(own: vs.Agent, command: Command) -> None:
    assert command("continual", *TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE, "run_dir=sequence").code == 0
    requests: list[tuple[Callable[[], Any], str]] = [
        (lambda: own.predict(np.zeros(2), "up"), "unknown task 'up'; this run has left, right"),
        (lambda: own.predict(np.zeros(3), "left"), "this task observes 2 numbers"),
        (lambda: own.predict(np.zeros((2, 3, 2)), "left"), r"give one \[F\], or a batch \[N, F\]"),
        (lambda: own.evaluate(episodes=0), "episodes is 0"),
        (lambda: own.export("up", "there"), "unknown task 'up'"),
        (lambda: own.export("left", "there", format="tflite"), "format is 'tflite'; choose peft, torch, onnx"),
        (lambda: own.export("left", "run"), "out=run is there already"),
        (lambda: vs.load("nowhere"), "no config.yaml in nowhere"),
        (lambda: vs.load("run", device="tpu"), "device is 'tpu'; choose auto, cpu, cuda"),
        (lambda: vs.load("run", checkpoint="first"), "unknown checkpoint 'first'"),
        (lambda: vs.load("run", envs={"left": ENVS["left"]}), "right"),
        (lambda: vs.load("sequence"), "sequence is a sequence of tasks"),
        (lambda: vs.train("pointmass", envs=ENVS), "env=pointmass and envs are both given"),
        (lambda: vs.train(envs={}), "no environments given"),
    ]
    for request, named in requests:
        with pytest.raises(vs.UserError, match=named) as error:
            request()
        assert "\n" not in str(error.value)
    assert not Path("there").exists()


def test_what_an_agent_says_is_what_the_commands_write(command: Command, folder: Path) -> None:
    agent = vs.train("pointmass", *PPO, total_transitions=640, run_dir="run", observe={"every": 320})
    assert agent.kl() == {task: row["kl"] for task, row in agent.results["tasks"].items()}
    assert command("report", "sharing", "run=run").code == 0
    written = json.loads(Path("run/report_sharing/sharing.json").read_text())
    assert json.loads(json.dumps(agent.sharing())) == written
    ours = agent.evaluate(episodes=3, seed=5)
    assert command("evaluate", "run=run", "episodes=3", "seed=5", "device=cpu").code == 0
    assert ours == json.loads(Path("run/evaluation.json").read_text())
    with pytest.raises(vs.UserError, match="leave envs out"):
        vs.load("run", envs=ENVS)
    shared = vs.train("pointmass", *PPO, network="shared", total_transitions=160, run_dir="shared")
    with pytest.raises(vs.UserError, match="network=shared has no posterior"):
        shared.kl()
    with pytest.raises(vs.UserError, match="no sharing to report"):
        shared.sharing()


def test_exports_are_those_of_the_command(folder: Path, command: Command) -> None:
    agent = vs.train("pointmass", *PPO, total_transitions=160, run_dir="run")
    task, obs = agent.tasks[3], torch.randn(6, 4)
    assert agent.export(task, "policy") == Path("policy")
    actions = torch.from_numpy(agent.predict(obs, task))
    torch.testing.assert_close(torch.export.load("policy/policy.pt2").module()(obs), actions, rtol=0, atol=1e-5)
    assert command("export", "run=run", f"task={task}", "format=torch", "out=same").code == 0
    assert Path("policy/export.json").read_text() == Path("same/export.json").read_text()
    assert (agent.export(task, "adapter", format="peft") / "actor").is_dir()
    onnxruntime = pytest.importorskip("onnxruntime")
    agent.export(task, "deep/policy.onnx")
    agent.export(task, "deep/policy.pt2")
    assert sorted(path.name for path in Path("deep").iterdir()) == ["policy.onnx", "policy.pt2"]
    session = onnxruntime.InferenceSession("deep/policy.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"observation": obs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), actions, rtol=0, atol=1e-5)
