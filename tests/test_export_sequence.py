"""``export`` of a sequence of tasks: what the files compute is what its method acts with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import SEQUENCE, TINY, TINY_ALGORITHM
from safetensors.torch import load_file
from test_errors import assert_one_line
from test_export import export, loaded
from torch import Tensor
from torch.nn import functional as F

from varshare_rl.adapters import apply_lora, read_adapter
from varshare_rl.config import Device
from varshare_rl.continual.sequence import SequenceRun, load_sequence
from varshare_rl.nn.merge import merged
from varshare_rl.nn.plain import read_network
from varshare_rl.registry import registered
from varshare_rl.run.loop import Run
from varshare_rl.transfer.methods.varshare import VarShareMethod

NORMAL = "algorithm.normalize_observations=true"
LEARN = (*TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE, NORMAL, "network.layer_norm=true", "run_dir=run")


def learn(command: Command, *settings: str) -> SequenceRun:
    outcome = command("continual", *LEARN, *settings)
    assert outcome.code == 0, outcome.err
    return load_sequence(Path("run"), "last", Device.cpu)[0]


def normalized(sequence: SequenceRun, task: int, obs: Tensor) -> Tensor:
    state = sequence.progress.normalizers[task]
    deviation = (state["moments.squared_deviations"] / state["moments.count"]).sqrt().clamp_min(1e-4)
    return ((obs - state["moments.mean"].float()) / deviation.float()).clamp(-10, 10)


def acted(sequence: SequenceRun, task: int, obs: Tensor) -> Tensor:
    """What a task of two dimensions of action is acted with, from the method's network itself."""
    outputs = sequence.networks.policy(task)(
        normalized(sequence, task, obs).unsqueeze(0), torch.zeros(1, dtype=torch.int64)
    )
    return torch.tanh(outputs[0, :, :2])


#: Those whose policies differ most in their parts; all others in the slow tests.
EXPORTED = ("pnn", "share", "varshare", "lora")


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=() if method in EXPORTED else pytest.mark.slow) for method in registered("method")],
)
def test_every_learnt_task_of_a_sequence_is_exported_as_it_is_acted(command: Command, method: str) -> None:
    settings = ("method.initial_tasks=1",) if method == "share" else ()
    sequence = learn(command, f"method={method}", *settings)
    obs = torch.randn(32, 4)
    every = []
    for task, entry in enumerate(sequence.tasks):
        export(command, f"task={entry.name}", "format=torch", f"out={task}")
        every.append(loaded(f"{task}/policy.pt2")(obs))
        torch.testing.assert_close(every[task], acted(sequence, task, obs), rtol=0, atol=1e-5)
    same = method == "frozen"  # which learns no statistics either
    assert torch.allclose(every[0], every[1], atol=1e-4) == same
    about = json.loads(Path("1/export.json").read_text())
    assert (about["task"], about["method"], about["checkpoint"]) == ("normal_right", method, "last-000000000480")
    assert about["transitions"] == sum(cost["transitions"] for cost in sequence.progress.costs)
    assert about["conditions"]["seed"] == 0


@pytest.mark.slow
def test_choices_and_tasks_that_come_round_again_are_exported(command: Command) -> None:
    settings = ("env=cartpole", "env.horizon=20", "method=copies", "repeats=2", "total_transitions=640")
    outcome = command("continual", *TINY, *TINY_ALGORITHM["ppo"], *settings, NORMAL, "run_dir=run")
    assert outcome.code == 0, outcome.err
    sequence = load_sequence(Path("run"), "last", Device.cpu)[0]
    task = len(sequence.tasks) // 2
    name = sequence.tasks[task].name
    assert name.endswith(" (2)")
    export(command, f"task='{name}'", "format=torch")
    (files,) = Path("run/export").iterdir()
    assert files.name == f"{name.replace(' ', '_')}_torch"
    obs = torch.randn(32, 4)
    logits = sequence.networks.policy(task)(
        normalized(sequence, task, obs).unsqueeze(0), torch.zeros(1, dtype=torch.int64)
    )
    assert torch.equal(loaded(f"{files}/policy.pt2")(obs), logits[0].argmax(-1))


def test_a_task_of_a_sequence_as_onnx(command: Command) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    sequence = learn(command, "method=lora")
    export(command, "task=swapped_left", "format=onnx", "out=policy")
    assert json.loads(Path("policy/export.json").read_text())["largest_difference"] <= 1e-5
    session = onnxruntime.InferenceSession("policy/policy.onnx", providers=["CPUExecutionProvider"])
    obs = torch.randn(32, 4)
    (found,) = session.run(None, {"observation": obs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), acted(sequence, 2, obs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "share", "varshare"])
def test_adapters_of_a_sequence_go_with_their_base(command: Command, method: str) -> None:
    sequence = learn(
        command, f"method={method}", "method.rank=3", *(("method.initial_tasks=1",) * (method == "share"))
    )
    export(command, "task=swapped_left", "format=peft", "out=files")
    side = load_file("files/varshare_posterior.safetensors")
    readme = Path("files/README.md").read_text()
    if method == "varshare":
        governed = sequence.networks.method
        assert isinstance(governed, VarShareMethod)
        for path, plain in {"layers.0": "0", "layers.1": "3"}.items():
            for factor, deviation in zip("AB", governed.sigmas[2][path], strict=True):
                torch.testing.assert_close(F.softplus(side.pop(f"actor.{plain}.rho_{factor}")), deviation)
        assert "softplus(rho)" in readme
    else:
        assert "rho" not in readme
    assert set(side) == {"observation.mean", "observation.std"}
    base = read_network("files/actor_base")
    alone = base(torch.ones(1, 4))
    assert torch.equal(
        alone, merged(sequence.networks.policy(0), 0)(torch.ones(1, 4))
    )  # what the first task learnt
    adapter, info = read_adapter("files/actor")
    assert (list(adapter), info.base_model) == (["0", "3"], "actor_base")
    lora = apply_lora(base, list(adapter))
    lora.load("files/actor", "task")
    lora.activate("task")
    obs = torch.randn(32, 4)
    mean = base(((obs - side["observation.mean"]) / side["observation.std"]).clamp(-10, 10))[:, :2]
    torch.testing.assert_close(torch.tanh(mean), acted(sequence, 2, obs), rtol=0, atol=2e-6)
    assert not torch.equal(base(torch.ones(1, 4)), alone)


def test_old_tasks_are_exported_as_from_their_own_run(command: Command) -> None:
    """With their statistics of observations and, by a method that keeps them, the spreads of their posteriors."""
    tasks = ("env.tasks=[normal_left,flipped_up]", NORMAL, "total_transitions=640", "run_dir=trained")
    assert command("train", *TINY, *TINY_ALGORITHM["ppo"], *tasks).code == 0
    learn(command, "method=varshare", "from=trained", "env.tasks=[normal_right,swapped_left]")
    for run in ("run", "trained"):
        for kind in ("torch", "peft"):
            outcome = command("export", f"run={run}", "task=flipped_up", f"format={kind}", f"out={run}_{kind}")
            assert outcome.code == 0, outcome.err
    obs = torch.randn(32, 4)
    torch.testing.assert_close(*(loaded(f"{run}_torch/policy.pt2")(obs) for run in ("run", "trained")))
    ours, theirs = (load_file(f"{run}_peft/varshare_posterior.safetensors") for run in ("run", "trained"))
    kept = {key: value for key, value in theirs.items() if not key.endswith("prior_scale")}
    assert ours.keys() == kept.keys()
    for key, value in kept.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


WRONG_OF_SEQUENCES = {
    "unknown_task": (
        "format=torch",
        "task=reach-v9",
        "unknown task 'reach-v9'; this run has normal_left, normal_right",
    ),
    "critics": ("format=peft", "critics=true", "critics=true, and run is a sequence of tasks"),
    "best": ("format=torch", "checkpoint=best", "keeps its last checkpoint only"),
    "no_adapters": ("format=peft", "out=x", "method=finetune has no adapters, which are in lora, share, varshare"),
    "not_learnt": (
        "format=torch",
        "task=swapped_left",
        "task swapped_left is not learnt yet; learnt are normal_left",
    ),
}


def test_what_a_sequence_does_not_have_is_named_in_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(run: Run) -> None:
        if "01_" in str(run.run_dir):
            raise KeyboardInterrupt
        train(run)

    train = Run.train
    monkeypatch.setattr(Run, "train", stopped)
    assert command("continual", *LEARN, "method=finetune").code == 130
    before = sorted(Path().rglob("*"))
    for *arguments, named in WRONG_OF_SEQUENCES.values():
        task = () if any(argument.startswith("task=") for argument in arguments) else ("task=normal_left",)
        outcome = command("export", "run=run", *arguments, *task)
        assert_one_line(outcome.code, outcome.err, named)
    assert sorted(Path().rglob("*")) == before


def test_the_task_that_made_the_base_has_no_adapter(command: Command) -> None:
    learn(command, "method=lora", "env.tasks=[normal_left]")
    outcome = command("export", "run=run", "task=normal_left", "format=peft")
    assert_one_line(outcome.code, outcome.err, "task normal_left was learnt by the base itself and has no adapter")
    assert not Path("run/export").exists()
