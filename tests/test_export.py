"""``export``: what the files compute is what the agent does in evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from safetensors.torch import load_file
from test_errors import assert_one_line
from torch import Tensor

from varshare_rl.adapters import apply_lora, read_adapter
from varshare_rl.assemble import TrainedAgent, load_agent
from varshare_rl.config import Device
from varshare_rl.nn.merge import merged
from varshare_rl.nn.plain import read_network

TASK = "flipped_down"


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


@pytest.mark.parametrize("network", ["varshare_lora", "varshare", "shared", "independent", "l2_soft", "multi_head"])
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_torch_files_compute_the_actions_of_evaluation(command: Command, algorithm: str, network: str) -> None:
    agent = train(command, f"network={network}", "network.layer_norm=true", algorithm=algorithm)
    export(command, f"task={TASK}", "format=torch", "out=policy")
    assert sorted(os.listdir("policy")) == ["export.json", "network.json", "network.safetensors"]
    obs, actions = observations_and_actions(agent, TASK)
    torch.testing.assert_close(read_network("policy")(obs), actions, rtol=0, atol=2e-6)


def test_discrete_policies_are_exported_with_their_choice(command: Command) -> None:
    agent = train(command, "env=cartpole", "env.envs_per_task=2")
    task = agent.suite.task_names[1]
    export(command, f"task={task}", "format=torch")
    obs, actions = observations_and_actions(agent, task)
    assert torch.equal(read_network(f"run/export/{task}_torch")(obs), actions)


def test_files_say_what_they_are(command: Command) -> None:
    train(command)
    assert "deep/policy" in export(command, f"task={TASK}", "format=torch", "out=deep/policy")
    about = json.loads(Path("deep/policy/export.json").read_text())
    assert (about["task"], about["checkpoint"], about["transitions"]) == (TASK, "last-000000000960", 960)
    assert about["conditions"]["seed"] == 0


ONNX = {
    "ppo": ("ppo", ()),
    "sac": ("sac", ("network.activation=silu", "network.layer_norm=true")),
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
    assert json.loads(Path("policy/export.json").read_text())["checked_with_onnxruntime"]
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
    for name in critics:
        network = agent.algorithm.trained_modules()["critic"].get_submodule(
            "network" if name == "critic" else f"networks.{name[-1]}"
        )
        x = torch.randn(8, network.get_submodule("layers.0").in_features)  # type: ignore[arg-type]
        critic = apply_lora(read_network(f"files/{name}_base"), ["0", "2"])
        critic.load(f"files/{name}", TASK)
        critic.activate(TASK)
        index = list(agent.suite.task_names).index(TASK)
        torch.testing.assert_close(critic.model(x), merged(network, index)(x), rtol=0, atol=1e-5)
    assert side["actor.0.rho_A"].shape == (3, obs.shape[1])
    base = read_network("files/actor_base")
    adapter, _ = read_adapter("files/actor")
    lora = apply_lora(base, list(adapter))
    lora.load("files/actor", TASK)
    lora.activate(TASK)
    mean = base(obs)[:, : actions.shape[1]]
    torch.testing.assert_close(torch.tanh(mean), actions, rtol=0, atol=2e-6)


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
    assert_one_line(outcome.code, outcome.err, "varshare_rl[onnx]")


def test_a_damaged_network_is_named(command: Command) -> None:
    train(command)
    export(command, f"task={TASK}", "format=torch", "out=policy")
    modules = json.loads(Path("policy/network.json").read_text())
    modules["modules"].append({"kind": "os.system"})
    Path("policy/network.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"policy.*os\.system"):
        read_network("policy")
