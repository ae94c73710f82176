"""``export``: what the files compute is what the agent does in evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM, last_of_each
from safetensors.torch import load_file
from test_errors import assert_one_line
from torch import Tensor, nn

import varshare_rl as vs
from varshare_rl.adapters import apply_lora, read_adapter
from varshare_rl.assemble import TrainedAgent, load_agent
from varshare_rl.config import Device
from varshare_rl.data.normalizers import ReturnStdScaler
from varshare_rl.nn.plain import read_network
from varshare_rl.registry import registered

TASK = "flipped_down"
DOCS = Path(vs.__file__).resolve().parent.parent / "docs"


def train(command: Command, *settings: str, algorithm: str = "ppo") -> TrainedAgent:
    normalized = f"algorithm.normalize_observations={'true' if algorithm == 'ppo' else 'false'}"
    options = (*TINY, *TINY_ALGORITHM[algorithm], normalized, "total_transitions=960", "run_dir=run", *settings)
    outcome = command("train", *options)
    assert outcome.code == 0, outcome.err
    return load_agent(Path("run"), "last", Device.cpu)


def export(command: Command, *options: str) -> str:
    outcome = command("export", "run=run", *options)
    assert outcome.code == 0, outcome.err
    return outcome.out


def observations_and_actions(agent: TrainedAgent, task: str) -> tuple[Tensor, Tensor]:
    """Raw observations ``[32, F]`` and what the agent does in evaluation."""
    index = list(agent.suite.task_names).index(task)
    spec = agent.algorithm.spec  # type: ignore[attr-defined]
    obs = torch.randn(spec.num_tasks, 32, spec.obs_size)
    return obs[index], agent.algorithm.evaluation_policy(32).act(obs)[index]


def loaded(file: str) -> nn.Module:
    """A program in a file, as its user gets it."""
    return torch.export.load(file).module()


#: Policies whose bounds are often met.
CLIPPED = (
    "algorithm.policy=clipped_gaussian", "algorithm.log_std=parameter", "algorithm.min_observation_std=0.3",
    "network.output_gain=5",
)  # fmt: skip

NETWORKS = {
    **dict.fromkeys(registered("network"), ()),
    "bronet": ("network.blocks=bronet",),
    "tanh": ("network.activation=tanh", "network.layer_norm=true"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("varshare_lora", "moore") else pytest.mark.slow) for n in NETWORKS]
)
def test_torch_files_compute_the_actions_of_evaluation(command: Command, name: str) -> None:
    network = name if name in registered("network") else "varshare_lora"
    algorithm = "sac" if name == "tanh" else "ppo"
    agent = train(command, f"network={network}", *NETWORKS[name], algorithm=algorithm)
    export(command, f"task={TASK}", "format=torch", "out=policy")
    assert sorted(os.listdir("policy")) == ["export.json", "policy.pt2"]
    obs, actions = observations_and_actions(agent, TASK)
    policy = loaded("policy/policy.pt2")
    for rows in (slice(None), slice(1), slice(7)):
        torch.testing.assert_close(policy(obs[rows]), actions[rows], rtol=0, atol=1e-5)


def test_clipped_policies_are_exported_with_their_bounds(command: Command) -> None:
    agent = train(command, *CLIPPED)
    export(command, f"task={TASK}", "format=torch", "out=policy")
    obs, actions = observations_and_actions(agent, TASK)
    assert 0.05 < (actions.abs() == 1).float().mean() < 0.95
    torch.testing.assert_close(loaded("policy/policy.pt2")(obs), actions, rtol=0, atol=1e-5)


def test_discrete_policies_are_exported_with_their_choice(command: Command) -> None:
    agent = train(command, "env=cartpole", "env.envs_per_task=2")
    task = agent.suite.task_names[1]
    export(command, f"task={task}", "format=torch")
    obs, actions = observations_and_actions(agent, task)
    assert torch.equal(loaded(f"run/export/{task}_torch/policy.pt2")(obs), actions)


class Lever(gymnasium.Env[Any, Any]):
    """Environments whose spaces are their own: sizes, bounds, types, first choices."""

    def __init__(self, size: int, action_space: gymnasium.Space[Any]) -> None:
        self.observation_space = gymnasium.spaces.Box(-5.0, 5.0, (size,), np.float64)
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-5.0, 5.0, self.observation_space.shape), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.np_random.uniform(-5.0, 5.0, self.observation_space.shape), 1.0, False, False, {}


def levers() -> dict[str, Any]:
    low, high = np.array([-0.4, 2.0, 0.0]), np.array([0.4, 7.0, 1e3])
    spaces: dict[str, tuple[int, gymnasium.Space[Any]]] = {
        "small": (
            3,
            gymnasium.spaces.Box(low[:1].astype(np.float32), high[:1].astype(np.float32), dtype=np.float32),
        ),
        "exact": (5, gymnasium.spaces.Box(low, high, dtype=np.float64)),
        "whole": (4, gymnasium.spaces.Box(-3, 12, (2,), np.int16)),
    }
    return {name: lambda given=given: Lever(*given) for name, given in spaces.items()}


def choices() -> dict[str, Any]:
    return {
        name: lambda size=size, n=n, start=start: Lever(size, gymnasium.spaces.Discrete(n, start=start))
        for name, size, n, start in (("two", 2, 2, 0), ("four", 5, 4, -3))
    }


def run_onnx(file: str, obs: Any) -> Any:
    """What a graph computes, as its user gets it."""
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", obs.shape[1]]
    return session.run(None, {"observation": obs.astype(np.float32)})[0]


@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("makers", [levers, choices])
def test_policies_have_the_sizes_bounds_and_types_of_their_environment(
    folder: Path, makers: Any, ending: str
) -> None:
    options = [item for item in (*TINY, *TINY_ALGORITHM["ppo"]) if not item.startswith("env=")]
    agent = vs.train(*options, envs=makers(), total_transitions=480, run_dir="run", env={"horizon": 20})
    rng = np.random.default_rng(0)
    for task, make in makers().items():
        env = make()
        obs = rng.uniform(-5, 5, (64, *env.observation_space.shape))
        obs[0, 0], obs[1, 0] = np.nan, np.inf
        file = agent.export(task, f"{task}.{ending}")
        rows = torch.from_numpy(obs).float()
        actions = loaded(str(file))(rows).numpy() if ending == "pt2" else run_onnx(str(file), obs)
        assert actions.dtype == (env.action_space.dtype if makers is levers else np.int64)
        np.testing.assert_allclose(actions, agent.predict(obs, task), rtol=1e-5, atol=1e-5)
        assert all(env.action_space.contains(action) for action in actions)


@pytest.mark.slow
def test_a_padded_suite_of_mujoco_gives_hoppers_own_policy(command: Command) -> None:
    agent = train(command, "env=gymnasium", "env.ids=[Hopper-v5,HalfCheetah-v5]", "env.envs_per_task=2")
    assert agent.suite.observation_space.shape == (17,)
    export(command, "task=Hopper-v5", "format=torch", "out=policy")
    policy, env = loaded("policy/policy.pt2"), gymnasium.make("Hopper-v5")
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        action = policy(torch.as_tensor(obs, dtype=torch.float32).unsqueeze(0))[0].numpy()
        assert env.action_space.contains(action)
        np.testing.assert_allclose(action, vs.load("run", device="cpu").predict(obs, "Hopper-v5"), atol=1e-5)
        obs, _, ended, _, _ = env.step(action)
        if ended:
            break
    about = json.loads(Path("policy/export.json").read_text())
    assert about["observation"] == {"size": 11, "dtype": "float32"}
    assert about["action"] == {"size": 3, "low": [-1.0] * 3, "high": [1.0] * 3, "dtype": "float32"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with policy.pt2 and policy.onnx of one task."""
    with chdir(tmp_path_factory.mktemp("exported")):
        agent = vs.train(*TINY, *TINY_ALGORITHM["ppo"], total_transitions=160, run_dir="run")
        agent.export(TASK, "policy.pt2")
        agent.export(TASK, "policy.onnx")
        yield Path().absolute()


def test_the_example_runs_where_there_is_no_varshare_rl(exported: Path) -> None:
    pytest.importorskip("onnxruntime")
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    used = [block for block in blocks if "policy.pt2" in block or "policy.onnx" in block]
    assert len(used) == 2
    assert all(len(block.splitlines()) <= 10 for block in used)
    refuse = "import sys\nsys.modules['varshare_rl'] = None\n"
    said = "\nassert actions.shape == (64, 2), actions.shape\n"
    code = refuse + said.join(block.replace("11", "4") for block in used) + said
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_alone_say_where_they_come_from(exported: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    with zipfile.ZipFile(exported / "policy.pt2") as archive:
        (inside,) = (archive.read(name) for name in archive.namelist() if name.endswith("extra/export.json"))
    session = onnxruntime.InferenceSession(exported / "policy.onnx", providers=["CPUExecutionProvider"])
    for text, kind in ((inside, "torch"), (session.get_modelmeta().custom_metadata_map["export.json"], "onnx")):
        about = json.loads(text)
        assert (about["task"], about["format"], about["transitions"]) == (TASK, kind, 160)
        assert about["conditions"]["seed"] == 0


@pytest.mark.parametrize("spaces", ["box", "choices"])
def test_what_computes_something_else_is_not_written(
    folder: Path, spaces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = "pointmass" if spaces == "box" else "cartpole"
    options = last_of_each((*TINY, *TINY_ALGORITHM["ppo"], f"env={env}"))
    agent = vs.train(*options, total_transitions=160, run_dir="run")
    from varshare_rl.adapters.policy import NativeAction

    forward = NativeAction.forward
    monkeypatch.setattr(
        NativeAction, "forward", lambda self, x: forward(self, x + torch.tensor([3e-3, 0.0] * 2)[: x.shape[1]])
    )
    with pytest.raises(vs.UserError, match="the file's actions differ from the agent's by"):
        agent.export(agent.tasks[0], "policy")
    assert not Path("policy").exists()
    with pytest.raises(vs.UserError, match="differ from the agent's"):
        agent.export(agent.tasks[0], "policy.pt2")
    assert not Path("policy.pt2").exists()


def test_files_say_what_they_are(command: Command) -> None:
    train(command)
    assert "deep/policy" in export(command, f"task={TASK}", "format=torch", "out=deep/policy")
    about = json.loads(Path("deep/policy/export.json").read_text())
    assert (about["task"], about["checkpoint"], about["transitions"]) == (TASK, "last-000000000960", 960)
    assert about["conditions"]["seed"] == 0
    assert about["observation"] == {"size": 4, "dtype": "float32"}
    assert about["action"] == {"size": 2, "low": [-1.0, -1.0], "high": [1.0, 1.0], "dtype": "float32"}
    assert 0.0 <= about["largest_difference"] <= 1e-5


ONNX = {
    "ppo": ("ppo", ()),
    "sac": ("sac", ("network.activation=silu", "network.layer_norm=true")),
    "clipped": ("ppo", CLIPPED),
    "discrete": ("ppo", ("env=cartpole", "env.envs_per_task=2", "network.activation=elu")),
}


@pytest.mark.parametrize("case", ONNX)
def test_onnx_computes_the_actions_of_evaluation(command: Command, case: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    algorithm, settings = ONNX[case]
    agent = train(command, *settings, algorithm=algorithm)
    task = agent.suite.task_names[-1]
    export(command, f"task={task}", "format=onnx", "out=policy")
    assert sorted(os.listdir("policy")) == ["export.json", "policy.onnx"]
    assert json.loads(Path("policy/export.json").read_text())["largest_difference"] <= 1e-5
    obs, actions = observations_and_actions(agent, task)
    session = onnxruntime.InferenceSession("policy/policy.onnx", providers=["CPUExecutionProvider"])
    for rows in (slice(None), slice(1)):
        (found,) = session.run(None, {"observation": obs[rows].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), actions[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_peft_files_hold_the_base_and_the_correction(command: Command, algorithm: str) -> None:
    agent = train(command, "network.rank=3", algorithm=algorithm)
    export(command, f"task={TASK}", "format=peft", "critics=true", "out=files")
    critics = ["critic"] if algorithm == "ppo" else ["critic_0", "critic_1"]
    folders = [name for network in ("actor", *critics) for name in (network, f"{network}_base")]
    assert sorted(os.listdir("files")) == sorted(
        [*folders, "README.md", "export.json", "varshare_posterior.safetensors"]
    )
    obs, actions = observations_and_actions(agent, TASK)
    side = load_file("files/varshare_posterior.safetensors")
    if algorithm == "ppo":
        obs = ((obs - side["observation.mean"]) / side["observation.std"]).clamp(-10, 10)
    assert side["actor.0.rho_A"].shape == (3, obs.shape[1])
    base = read_network("files/actor_base")
    adapter, _ = read_adapter("files/actor")
    lora = apply_lora(base, list(adapter))
    lora.load("files/actor", TASK)
    lora.activate(TASK)
    mean = base(obs)[:, : actions.shape[1]]
    torch.testing.assert_close(torch.tanh(mean), actions, rtol=0, atol=2e-6)


def actions_of_readme(folder: str, obs: Tensor) -> Tensor:
    """What the code in an export's README computes."""
    code = Path(folder, "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    with chdir(folder):
        exec(code, names)
    return names["act"](obs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("makers", "more"), [(levers, ()), (levers, CLIPPED), (choices, ())])
def test_the_readme_of_an_adapter_acts_as_the_agent(folder: Path, makers: Any, more: tuple[str, ...]) -> None:
    pytest.importorskip("peft")
    options = [item for item in (*TINY, *TINY_ALGORITHM["ppo"], *more) if not item.startswith("env=")]
    agent = vs.train(*options, envs=makers(), total_transitions=480, run_dir="run", env={"horizon": 20})
    for task in agent.tasks:
        agent.export(task, task, format="peft")
        obs = torch.randn(32, makers()[task]().observation_space.shape[0])
        obs[0, 0] = float("nan")
        wanted = torch.from_numpy(agent.predict(obs, task)).double()
        torch.testing.assert_close(actions_of_readme(task, obs).double(), wanted, rtol=1e-5, atol=1e-5)


CRITICS = {
    "popart": ("ppo", ("critic=popart",)),
    "twins": ("sac", ("critic=popart", "algorithm.reward_scale=ars")),
    "categorical": ("sac", ("critic.loss=categorical", "critic.bins=11", "critic.popart=true")),
    "scaled": ("ppo", ()),
    "plain": ("sac", ()),
}


@pytest.mark.parametrize("case", CRITICS)
def test_critics_give_values_in_units_of_the_tasks_rewards(command: Command, case: str) -> None:
    algorithm, settings = CRITICS[case]
    scales = "env.reward_scales=[1,1,1,1,1,1,1,50]"
    agent = train(command, scales, *settings, algorithm=algorithm)
    task = agent.suite.task_names[-1]
    export(command, f"task={task}", "format=peft", "critics=true", "out=files")
    critic, scaler = agent.algorithm.critic, agent.algorithm.reward_scaler  # type: ignore[attr-defined]
    spec, index = agent.algorithm.spec, agent.suite.task_names.index(task)  # type: ignore[attr-defined]
    obs = torch.randn(spec.num_tasks, 16, spec.obs_size)
    action = torch.rand(spec.num_tasks, 16, 2) * 2 - 1
    with torch.no_grad():
        values = critic.eval()(obs, *((action,) if algorithm == "sac" else ()), spec.task_ids)
    wanted = values.view(-1, spec.num_tasks, 16)[:, index] / (
        1.0 / scaler.moments.std()[index]
        if isinstance(scaler, ReturnStdScaler)
        else scaler(torch.ones(8, 1))[index]
    )
    x = torch.cat([obs, action], -1)[index] if algorithm == "sac" else obs[index]
    for name, value in zip(["critic"] if algorithm == "ppo" else ["critic_0", "critic_1"], wanted, strict=True):
        base = read_network(f"files/{name}_base")
        adapter, _ = read_adapter(f"files/{name}")
        lora = apply_lora(base, list(adapter))
        lora.load(f"files/{name}", task)
        lora.activate(task)
        found = lora.model(x).squeeze(-1)
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-5, atol=1e-5)
    if case == "plain":
        network = critic.networks[0]
        torch.testing.assert_close(read_network("files/critic_0_base")[-1].weight, network.layers[-1].theta)


WRONG = {
    "no_run": ((f"task={TASK}", "format=torch"), "run=runs/<folder>"),
    "no_task": (("run=run", "format=torch"), "task=<name>"),
    "no_format": (("run=run", f"task={TASK}"), "format=peft"),
    "unknown_format": (("run=run", f"task={TASK}", "format=tflite"), "tflite"),
    "unknown_run": (("run=nowhere", f"task={TASK}", "format=torch"), "nowhere"),
    "unknown_task": (("run=run", "task=reach-v9", "format=torch"), "reach-v9"),
    "unknown_checkpoint": (("run=run", f"task={TASK}", "format=torch", "checkpoint=first"), "'first'"),
    "critic_elsewhere": (("run=run", f"task={TASK}", "format=torch", "critics=true"), "format=peft"),
    "no_adapters": (("run=run", f"task={TASK}", "format=peft"), "this run's is shared"),
    "other_ending": (("run=run", f"task={TASK}", "format=torch", "out=x.onnx"), "a file of format=onnx"),
    "out_is_there": (("run=run", f"task={TASK}", "format=torch", "out=run"), "out=run is there"),
    "out_below_a_file": (("run=run", f"task={TASK}", "format=torch", "out=run/config.yaml/x"), "config.yaml/x"),
}


def test_errors_are_one_line_and_leave_nothing(command: Command) -> None:
    train(command, "network=shared")
    before = sorted(Path().rglob("*"))
    for arguments, named in WRONG.values():
        outcome = command("export", *arguments)
        assert_one_line(outcome.code, outcome.err, named)
    assert sorted(Path().rglob("*")) == before


def test_onnx_without_its_packages_names_the_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    train(command)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = command("export", "run=run", f"task={TASK}", "format=onnx")
    assert_one_line(outcome.code, outcome.err, "of the extra onnx")


def test_a_damaged_network_is_named(command: Command) -> None:
    train(command)
    export(command, f"task={TASK}", "format=peft", "out=policy")
    file = Path("policy/actor_base/network.json")
    modules = json.loads(file.read_text())
    modules["modules"].append({"kind": "os.system"})
    file.write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"policy.*os\.system"):
        read_network("policy/actor_base")
