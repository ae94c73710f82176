"""A sequence of tasks: learnt by the loop, evaluated after each, stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import SEQUENCE, TINY, TINY_ALGORITHM
from omegaconf import OmegaConf

from varshare_rl.config import Device
from varshare_rl.continual.agent import beside_networks
from varshare_rl.continual.evaluation import Evaluator
from varshare_rl.continual.sequence import SequenceRun, load_sequence
from varshare_rl.registry import registered
from varshare_rl.run import loop
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.run.evaluation import Evaluation
from varshare_rl.run.loop import Run
from varshare_rl.run.signals import Interrupted
from varshare_rl.run.tracker import Tracker
from varshare_rl.transfer.bases import LowRankMethod
from varshare_rl.transfer.likelihood import CategoricalOutputs, GaussianPolicy, UnitGaussian
from varshare_rl.transfer.methods.replay import ExperienceReplay
from varshare_rl.transfer.networks import AgentNetworks
from varshare_rl.transfer.share.selection import ReturnBandit

PPO = (*TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE)
SAC = (*TINY, *TINY_ALGORITHM["sac"], *SEQUENCE)


def without_clock(document: Any) -> Any:
    """The document without what the clock decides."""
    if isinstance(document, dict):
        return {key: without_clock(value) for key, value in document.items() if "second" not in key}
    return [without_clock(item) for item in document] if isinstance(document, list) else document


def results(run: str) -> Any:
    return without_clock(json.loads((Path(run) / "summary.json").read_text()))


def some_fast(*chosen: str) -> list[Any]:
    """All methods, of which those not chosen are for the slow tests: they differ in what others do not touch."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in registered("method")]


@pytest.mark.parametrize("method", some_fast("replay", "share"))
def test_every_method_learns_a_sequence_with_sac(command: Command, method: str) -> None:
    assert command("continual", *SAC, f"method={method}", "run_dir=run").code == 0
    check_document("run")


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
@pytest.mark.parametrize("method", ["lora", "share", "varshare"])
def test_corrections_have_a_rate_of_their_own_and_the_base_has_not(
    command: Command, method: str, algorithm: str
) -> None:
    """With next to none the base is learnt as ever, and corrections stay where they begin."""
    given = (*(PPO if algorithm == "ppo" else SAC), f"method={method}")
    found: dict[str, SequenceRun] = {}
    for name, scale in (("usual", 1), ("still", 1e-9)):
        outcome = command("continual", *given, f"method.lr_scale={scale}", f"run_dir={name}")
        assert outcome.code == 0, outcome.err
        found[name] = load_sequence(Path(name), "last", Device.cpu)[0]
    usual, still = (found[name].networks.method for name in ("usual", "still"))
    assert isinstance(usual, LowRankMethod)
    assert isinstance(still, LowRankMethod)
    learnt, base = usual.base.weights, still.base.weights
    assert learnt is not None
    assert base is not None
    assert all(torch.equal(learnt[path], base[path]) for path in learnt)
    moved, kept = (
        max(float((part.scale * part.b @ part.a).abs().max()) for part in method.adapter(1).values())
        for method in (usual, still)
    )
    assert kept < 1e-6
    assert moved > 1e-4


def check_document(run: str) -> None:
    document = results(run)
    assert document["tasks"] == ["normal_left", "normal_right", "swapped_left"]
    assert [len(row) for row in document["success"]] == [3, 3, 3, 3]
    assert len(document["curves"]) == len(document["per_task"]) == 3
    assert document["per_task"][0]["trained_parameters"] > 0
    assert document["per_task"][0]["transitions"] == 160
    assert document["curves"][0]["transitions"] == [0.0, 80.0, 160.0]
    assert all(sum(cost["stored_bytes"].values()) > 0 for cost in document["per_task"])
    assert not list(Path(run, "tasks").rglob("state.json"))  # what is needed is in the sequence's own checkpoint


@pytest.mark.parametrize(
    ("method", "at"), [*product(registered("method"), ["within"]), ("ewc", "between"), ("share", "between")]
)
def test_a_sequence_that_was_stopped_goes_on_to_the_same_end(
    command: Command, command_once: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str, at: str
) -> None:
    """Stopped in the middle of the second task, or after the first one, where the other way begins, too."""
    options = (*PPO, f"method={method}", "averaged_evaluations=2")
    command_once("continual", *options, "run_dir=whole")
    check_document("whole")
    calls = {"train": 0}
    train, step = Run.train, Run._after_step

    def interrupted(run: Run) -> None:
        step(run)
        if calls["train"] == 2 and run.transitions == 80:
            run.save("last")
            raise Interrupted(15)

    def counted(run: Run) -> Any:
        calls["train"] += 1
        if at == "between" and calls["train"] == 2:
            raise KeyboardInterrupt
        return train(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_after_step", interrupted)
        patched.setattr(Run, "train", counted)
        outcome = command("continual", *options, "run_dir=halves")
    if method == "frozen":  # nothing is trained in the second task
        assert outcome.code == 0
        return
    assert outcome.code == (130 if at == "between" else 143)
    if at == "within":
        assert "python -m varshare_rl.continual resume=halves" in outcome.out
    outcome = command("continual", "resume=halves")
    assert outcome.code == 0, outcome.err
    assert results("halves") == results("whole")
    states = [load_checkpoint(find_checkpoint(Path(run))) for run in ("whole", "halves")]
    assert str(without_clock(states[0]["governor"])) == str(without_clock(states[1]["governor"]))


def test_share_reports_its_errors_after_every_merge(command: Command) -> None:
    outcome = command("continual", *PPO, "method=share", "method.initial_tasks=1", "run_dir=run")
    assert outcome.code == 0, outcome.err
    report = json.loads(Path("run/tasks/02_swapped_left/report.json").read_text())
    assert {row["task"] for row in report["rows"]} == {1, 2}
    assert all(0 <= row["error"] <= 0.02 for row in report["rows"])
    assert "largest error" in outcome.out


def test_hidden_task_ids_are_found_by_return(command: Command) -> None:
    outcome = command("continual", *PPO, "method=copies", "task_ids=hidden", "run_dir=run")
    assert outcome.code == 0, outcome.err
    document = results("run")
    assert document["task_ids"] == "hidden"
    assert all(task in (0.0, 1.0, 2.0) for task in document["acted_as"][-1])


def test_what_is_carried_over(command: Command) -> None:
    carried = ("carry.critic=method", "carry.optimizer=true", "carry.replay=true")
    assert command("continual", *SAC, "method=finetune", *carried, "run_dir=run").code == 0
    assert results("run")["carried"] == {"critic": "method", "optimizer": True, "replay": True}
    assert command("continual", *PPO, "method=finetune", "carry.critic=fresh", "run_dir=fresh").code == 0


def test_tasks_that_come_round_again_have_names_of_their_own(command: Command) -> None:
    assert command("continual", *PPO, "method=finetune", "repeats=2", "run_dir=run").code == 0
    document = results("run")
    assert document["tasks"][3:] == ["normal_left (2)", "normal_right (2)", "swapped_left (2)"]
    assert len(document["success"]) == 7
    assert document["per_task"][0]["transitions"] == 80


@pytest.mark.parametrize("env", ["cartpole", "lunarlander"])
def test_other_suites(command: Command, env: str) -> None:
    options = (
        *TINY, *TINY_ALGORITHM["ppo"], f"env={env}", "env.horizon=20", "total_transitions=160",
        "memory_transitions=8", "method=ewc", "run_dir=run",
    )  # fmt: skip
    outcome = command("continual", *options)
    assert outcome.code == 0, outcome.err


ADAPTING = ("lora", "share", "varshare", "frozen", "copies", "pnn", "shared_private")


@pytest.fixture
def trained(command_once: Callable[..., Path]) -> str:
    """A run of two tasks with normalised observations."""
    options = (*TINY, *TINY_ALGORITHM["ppo"], "env.tasks=[normal_left,flipped_up]", "env.envs_per_task=4")
    normal = ("algorithm.normalize_observations=true", "network.layer_norm=true", "elbo.draw.acting=per_update")
    return str(command_once("train", *options, *normal, "total_transitions=640", "run_dir=trained"))


@pytest.mark.parametrize("method", registered("method"))
def test_a_sequence_goes_on_from_a_multi_task_agent(command: Command, trained: str, method: str) -> None:
    """The old tasks do as well as their agent in evaluation, and as ever after by methods that promise it."""
    options = (*PPO, "env.tasks=[normal_right,swapped_left]", "algorithm.normalize_observations=true")
    outcome = command("continual", *options, f"method={method}", f"from={trained}", "run_dir=run")
    assert outcome.code == 0, outcome.err
    document = results("run")
    assert document["old_tasks"] == 2
    assert document["tasks"] == ["normal_left", "flipped_up", "normal_right", "swapped_left"]
    before = [row[:2] for row in document["return"]]
    if method in ADAPTING:
        assert before[0] == before[1] == before[2]
    if method in ("lora", "share", "varshare", "copies", "pnn"):
        summary = json.loads(Path("trained/summary.json").read_text())
        returns = [summary["tasks"][task]["return"] for task in document["tasks"][:2]]
        assert before[0] == pytest.approx(returns, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "varshare"])
def test_adapters_start_from_the_most_similar_task(command: Command, trained: str, method: str) -> None:
    options = (*PPO, "env.tasks=[normal_right]", f"method={method}", "method.start=similar", f"from={trained}")
    outcome = command("continual", *options, "algorithm.normalize_observations=true", "run_dir=run")
    assert outcome.code == 0, outcome.err


def test_a_network_without_corrections_cannot_be_gone_on_from(command: Command) -> None:
    options = (*TINY, *TINY_ALGORITHM["ppo"], "network=soft_modularization", "total_transitions=160")
    assert command("train", *options, "run_dir=trained").code == 0
    outcome = command("continual", *PPO, "from=trained", "run_dir=run")
    assert outcome.code == 2
    assert "networks that a sequence can go on from" in outcome.err


WRONG = {
    "network": (("network=varshare_lora",), "network=varshare_lora is for many tasks"),
    "resets": (("algorithm.resets=1",), "algorithm.resets is 1"),
    "combiner": (("gradient=pcgrad",), "gradient.actor=pcgrad combines tasks"),
    "estimator": (("elbo.estimator=local",), "elbo.estimator is given"),
    "weight_samples": (("elbo.weight_samples=2", "method=varshare"), "elbo.weight_samples is given"),
    "initialization": (("critic.initialization=orthogonal",), "critic.initialization is given"),
    "output_gain": (("network.output_gain=0.01",), "network.output_gain is given"),
    "absorption": (("elbo.absorb.every=2",), "elbo.absorb"),
    "no_replay": (("carry.replay=true",), "carry.replay=true, and algorithm=ppo has no replay memory"),
    "no_moments": (("carry.optimizer=true", "method=lora"), "trains other parameters in every task"),
    "no_moments_of_packnet": (("carry.optimizer=true", "method=packnet"), "trains other parameters in every task"),
    "run_dir": (("run_dir=/proc/run",), "cannot make the run folder /proc/run"),
    "repeats": (("repeats=0",), "repeats is 0; it must be at least 1"),
    "averaged_with_hidden_ids": (
        ("averaged_evaluations=2", "task_ids=hidden"),
        "averaged_evaluations is 2, and those while a task is learnt know its id",
    ),
    "moments_of_other_weights": (
        ("carry.optimizer=true", "method=copies", "method.start=scratch"),
        "carry.optimizer=true, and method.start=scratch begins every task with other weights",
    ),
    "price": (("elbo.kl_weight=1",), "elbo.kl_weight is given, and a method of a sequence pays"),
    "price_schedule": (("elbo/schedule=dual",), "elbo.schedule is given, and a method of a sequence pays"),
    "draws": (
        ("elbo.draw.evaluation=per_episode", "method=varshare"),
        "elbo.draw.evaluation=per_episode draws weights, and a sequence is evaluated with the policies that its "
        "method keeps, which are those of posterior means; use mean",
    ),
    "averaged": (("averaged_evaluations=3",), "averaged_evaluations is 3, and a task has 2: 160 transitions"),
    "budget": (("total_transitions=2",), "total_transitions is 2 for 3 tasks"),
    "method": (("method=nothing",), "nothing"),
    "layers": (
        ("method=lora", "method.layers=[layers.0,typo]"),
        "method.layers has 'typo', and there is no such layer in this network; "
        "give all, last, or a list of some of layers.0, layers.1",
    ),
    "layers_of_the_critic": (
        (
            "method=lora",
            "network.hidden=[8,8]",
            "method.layers=[layers.2]",
            "critic.hidden=[8]",
            "carry.critic=method",
        ),
        "carry.critic=method, and for the critic: method.layers has 'layers.2'",
    ),
    "origin": (("from=nowhere",), "nowhere"),
    "resume": (("resume=nowhere",), "no run folder nowhere"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(command: Command, folder: Path, name: str) -> None:
    overrides, said = WRONG[name]
    base = () if name == "resume" else (*PPO, "run_dir=run")
    outcome = command("continual", *base, *overrides)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not any(folder.iterdir())


def test_hidden_ids_are_not_in_the_statistics_of_observations(command: Command) -> None:
    """A method without task ids has one policy, and that is one with the same statistics everywhere."""
    options = (*PPO, "algorithm.normalize_observations=true", "method=finetune")
    assert command("continual", *options, "task_ids=hidden", "run_dir=hidden").code == 0
    assert command("continual", *options, "run_dir=known").code == 0
    hidden, known = results("hidden"), results("known")
    assert hidden["acted_as"] == [[None] * 3, [0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert hidden["return"][3][2] == known["return"][3][2]
    assert hidden["return"][3][:2] != known["return"][3][:2]


@pytest.mark.parametrize("method", ["ewc", "lora"])
def test_clipped_policies_learn_a_sequence(command: Command, method: str) -> None:
    """What a method asks of a policy's outputs it is told where the standard deviation is none of them."""
    policy = (
        "algorithm.policy=clipped_gaussian",
        "algorithm.log_std=parameter",
        "algorithm.min_observation_std=0.1",
    )
    assert command("continual", *PPO, f"method={method}", *policy, "run_dir=run").code == 0
    check_document("run")


OWN_LOG_STD = ("algorithm.log_std=parameter", "algorithm.initial_log_std=-0.5", "algorithm.learning_rate=0.01")


@pytest.mark.parametrize("method", some_fast("finetune", "ewc", "replay", "frozen", "lora", "share"))
def test_every_task_keeps_a_log_standard_deviation_of_its_own(
    command: Command, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It starts where the options say, is that of the task's policy ever after, and what methods measure it by."""
    first: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    start, end = Run.start, AgentNetworks.end

    def started(run: Run, evaluate: bool) -> None:
        agent: Any = run.algorithm
        first.append(agent.actor.log_stds.detach().clone())
        last.append(agent.actor.log_stds)
        start(run, evaluate)

    def ended(networks: AgentNetworks, *given: torch.Tensor) -> None:
        likelihood = networks.specs["actor"][0].likelihood
        assert isinstance(likelihood, GaussianPolicy)
        assert torch.equal(likelihood.actor.get_parameter("log_stds"), last[-1])
        end(networks, *given)

    monkeypatch.setattr(Run, "start", started)
    monkeypatch.setattr(AgentNetworks, "end", ended)
    outcome = command("continual", *PPO, f"method={method}", *OWN_LOG_STD, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert all(bool((value == -0.5).all()) for value in first)
    learnt = last * 3 if method == "frozen" else last
    assert len({str(value.tolist()) for value in last}) == len(last)
    assert not any(bool((value == -0.5).any()) for value in last)
    sequence = load_sequence(Path("run"), "last", Device.cpu)[0]
    for number, (task, expected) in enumerate(zip(sequence.tasks, learnt, strict=True)):
        actor = sequence.evaluator.policy(task, number)[0]
        assert torch.equal(actor.get_parameter("log_stds"), expected)
    if isinstance(sequence.networks.method, ExperienceReplay):
        kept = torch.split(sequence.networks.method.outputs, 20, dim=1)
        for rows, expected in zip(kept, learnt, strict=True):
            assert torch.equal(rows[0, :, 2:], expected.expand(20, 2))


@pytest.mark.parametrize("popart", [(), ("critic.popart=true",)])
def test_a_log_standard_deviation_goes_through_a_stop_and_has_moments_of_its_own(
    command: Command, monkeypatch: pytest.MonkeyPatch, popart: tuple[str, ...]
) -> None:
    """And so do the units of critics, and what a method keeps of both."""
    options = (*PPO, "method=replay", *OWN_LOG_STD, "carry.optimizer=true", "carry.critic=method", *popart)
    begun: list[tuple[int, int]] = []
    start, step = Run.start, Run._after_step

    def started(run: Run, evaluate: bool) -> None:
        agent: Any = run.algorithm
        begun.append((len(agent.actor_step.optimizer.state), len(agent.actor_step.parameters)))
        start(run, evaluate)

    def interrupted(run: Run) -> None:
        step(run)
        if len(begun) == 2 and run.transitions == 80:
            run.save("last")
            raise Interrupted(15)

    monkeypatch.setattr(Run, "start", started)
    assert command("continual", *options, "run_dir=whole").code == 0
    assert begun == [(0, 5), (4, 5), (4, 5)]  # not those of the last task's
    begun.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Run, "_after_step", interrupted)
        assert command("continual", *options, "run_dir=halves").code == 143
    assert command("continual", "resume=halves").code == 0
    assert results("halves") == results("whole")
    whole, halves = (load_checkpoint(find_checkpoint(Path(run)))["progress"] for run in ("whole", "halves"))
    assert str(whole["log_stds"]) == str(halves["log_stds"])
    assert str(whole["units"]) == str(halves["units"])
    method = load_sequence(Path("halves"), "last", Device.cpu)[0].networks.methods["critic"][0]
    assert isinstance(method, ExperienceReplay)
    assert method.outputs.shape == (1, 60, 1 + len(popart))


def test_old_tasks_keep_the_log_standard_deviations_of_their_agent(
    command: Command, command_once: Callable[..., Path]
) -> None:
    options = (*TINY, *TINY_ALGORITHM["ppo"], *OWN_LOG_STD, "env.tasks=[normal_left,flipped_up]")
    command_once("train", *options, "env.envs_per_task=4", "total_transitions=640", "run_dir=trained")
    given = (*PPO, "env.tasks=[normal_right]", "method=lora", "from=trained", "run_dir=run")
    assert command("continual", *given).code == 0
    sequence = load_sequence(Path("run"), "last", Device.cpu)[0]
    theirs = load_checkpoint(find_checkpoint(Path("trained")))["algorithm"]["actor"]["log_stds"]
    assert theirs.shape == (2, 2)
    for number in range(2):
        actor = sequence.evaluator.policy(sequence.tasks[number], number)[0]
        assert torch.equal(actor.get_parameter("log_stds"), theirs[number : number + 1])


def test_target_critics_begin_in_the_units_that_critics_take_over(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    start = Run.start

    def compared(run: Run, evaluate: bool) -> None:
        agent: Any = run.algorithm
        theirs = agent.target_critic.state_dict()
        started.append(all(torch.equal(value, theirs[name]) for name, value in agent.critic.state_dict().items()))
        start(run, evaluate)

    monkeypatch.setattr(Run, "start", compared)
    outcome = command("continual", *SAC, "method=finetune", "critic.popart=true", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert started == [True] * 3


#: Tasks, by number, whose units the critic of each task begins in when it is kept by a method; None: in fresh ones.
UNITS: dict[str, list[int | None]] = {
    "finetune": [None, 0, 1],
    "ewc": [None, 0, 1],
    "copies": [None, 0, 1],
    "lora": [None, 0, 0],
    "share": [None, 0, 0],
    "varshare": [None, 0, 1],
    "pnn": [None, None, None],
}


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", UNITS)
def test_critics_of_a_method_begin_in_the_units_of_their_networks(
    command: Command, monkeypatch: pytest.MonkeyPatch, method: str, algorithm: str
) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    start = Run.start

    def started(run: Run, evaluate: bool) -> None:
        agent: Any = run.algorithm
        begun.append(beside_networks(agent.critic))
        for name, value in beside_networks(getattr(agent, "target_critic", agent.critic)).items():
            assert torch.equal(value, begun[-1][name])
        start(run, evaluate)

    monkeypatch.setattr(Run, "start", started)
    options = (*(PPO if algorithm == "ppo" else SAC), f"method={method}", "critic.popart=true")
    assert command("continual", *options, "carry.critic=method", "run_dir=run").code == 0
    ended = load_sequence(Path("run"), "last", Device.cpu)[0].progress.units
    assert [float(units["statistics.std"]) != 1.0 for units in ended] == [True] * 3
    for found, origin in zip(begun, UNITS[method], strict=True):
        expected = begun[0] if origin is None else ended[origin]
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("sac", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["ewc", "replay"])
@pytest.mark.parametrize("critic", ["critic.loss=categorical", "critic.popart=true"])
def test_methods_measure_critics_by_what_their_outputs_are(
    command: Command, monkeypatch: pytest.MonkeyPatch, method: str, algorithm: str, critic: str
) -> None:
    scales: list[bool] = []
    end = AgentNetworks.end

    def ended(networks: AgentNetworks, *given: torch.Tensor) -> None:
        for spec in networks.specs["critic"]:
            likelihood = spec.likelihood
            assert isinstance(likelihood, CategoricalOutputs if "categorical" in critic else UnitGaussian)
            if isinstance(likelihood, UnitGaussian):
                assert likelihood.affine is not None
                scales.append(bool(likelihood.affine.scale != 1.0))
        end(networks, *given)

    monkeypatch.setattr(AgentNetworks, "end", ended)
    options = (*(PPO if algorithm == "ppo" else SAC), f"method={method}", critic, "carry.critic=method")
    outcome = command("continual", *options, "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert all(scales)
    check_document("run")


def test_the_agent_says_whether_observations_are_normalised(command: Command, trained: str) -> None:
    """What its policies see is theirs to say, whatever is configured."""
    options = (*PPO, "env.tasks=[normal_right]", "algorithm.normalize_observations=false", "method=lora")
    other = ("algorithm.initial_log_std=-1", "algorithm.policy=clipped_gaussian", "algorithm.log_std=parameter")
    outcome = command("continual", *options, *other, f"from={trained}", "run_dir=run")
    assert outcome.code == 0, outcome.err
    kept = OmegaConf.load("run/config.yaml").algorithm
    theirs = OmegaConf.load("trained/config.yaml").algorithm
    for name in ("normalize_observations", "initial_log_std", "policy", "log_std", "min_observation_std"):
        assert kept[name] == theirs[name]
    summary = json.loads(Path("trained/summary.json").read_text())
    returns = [task["return"] for task in summary["tasks"].values()]
    assert results("run")["return"][0][:2] == pytest.approx(returns, rel=1e-5)


def test_a_task_of_the_agent_comes_round_again(command: Command, trained: str) -> None:
    outcome = command("continual", *PPO, "env.tasks=[normal_left]", "method=lora", f"from={trained}", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert results("run")["tasks"] == ["normal_left", "flipped_up", "normal_left (2)"]


def test_an_agent_of_other_actions_is_refused(command: Command, folder: Path) -> None:
    options = (*TINY, *TINY_ALGORITHM["ppo"], "network=varshare_lora", "env=cartpole", "total_transitions=480")
    assert command("train", *options, "run_dir=trained").code == 0
    outcome = command("continual", *PPO, "method=lora", "from=trained", "run_dir=run")
    assert outcome.code == 2
    assert "from=trained does other things than env=pointmass" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (folder / "run").exists()


def test_seconds_before_an_interruption_count(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Run._after_step

    def interrupted(run: Run) -> None:
        step(run)
        run.tracker._started -= 1000.0
        run.save("last")
        raise Interrupted(15)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_after_step", interrupted)
        assert command("continual", *PPO, "method=finetune", "run_dir=run").code == 143
    assert command("continual", "resume=run").code == 0
    document = json.loads(Path("run/summary.json").read_text())
    assert document["seconds"] > 1000
    assert document["per_task"][0]["seconds"] > 1000
    assert document["per_task"][1]["seconds"] < 500


def test_a_task_is_not_lost_while_all_tasks_are_evaluated(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training need not be done again."""
    assert command("continual", *PPO, "method=ewc", "run_dir=whole").code == 0
    rows: list[None] = []
    evaluate, start = SequenceRun._evaluate, Run.start

    def killed(sequence: SequenceRun, *given: Any) -> Any:
        found = evaluate(sequence, *given)
        rows.append(None)
        if len(rows) == 2:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(SequenceRun, "_evaluate", killed)
        assert command("continual", *PPO, "method=ewc", "run_dir=halves").code == 130
    started: list[Run] = []

    def noted(run: Run, evaluate: bool) -> None:
        started.append(run)
        start(run, evaluate)

    monkeypatch.setattr(Run, "start", noted)
    assert command("continual", "resume=halves").code == 0
    assert len(started) == 2  # of three tasks
    assert results("halves") == results("whole")
    assert not list(Path("halves/tasks").rglob("state.json"))


def test_every_round_of_selection_has_further_episodes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    earned: dict[tuple[ReturnBandit, int], list[float]] = {}
    update = ReturnBandit.update

    def noted(bandit: ReturnBandit, task: int, value: float) -> None:
        earned.setdefault((bandit, task), []).append(value)
        update(bandit, task, value)

    monkeypatch.setattr(ReturnBandit, "update", noted)
    hidden = ("method=copies", "task_ids=hidden", "selection_episodes=24", "run_dir=run")
    assert command("continual", *PPO, *hidden).code == 0
    assert any(len(values) > 1 for values in earned.values())
    assert all(len(set(values)) == len(values) for values in earned.values())


def test_a_curve_begins_with_the_network_that_learns(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the last task's policy: who learns from scratch does not begin with what that does."""
    numbers = iter(range(9))
    evaluate = loop.evaluate

    def numbered(*arguments: Any) -> Evaluation:
        tasks = evaluate(*arguments).tasks
        number = next(numbers) / 10
        return Evaluation({task: {**row, "success": number} for task, row in tasks.items()})

    monkeypatch.setattr(loop, "evaluate", numbered)
    assert command("continual", *PPO, "method=copies", "method.start=scratch", "run_dir=run").code == 0
    curves = results("run")["curves"]
    assert [curve["transitions"] for curve in curves] == [[0.0, 80.0, 160.0]] * 3
    assert [curve["success"] for curve in curves] == [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]


def test_commands_for_training_runs_say_what_a_sequence_is(command: Command) -> None:
    outcome = command("continual", *PPO, "env.tasks=[normal_left]", "method=finetune", "run_dir=run")
    assert outcome.code == 0, outcome.err
    for name, *given in (
        ("train", "resume=run"),
        ("continual", *PPO, "from=run"),
        ("report", "sharing", "run=run"),
        ("prune", "run=run"),
        ("calibrate", "run=run"),
    ):
        outcome = command(name, *given)
        assert outcome.code == 2
        assert outcome.err.startswith("error: run is a sequence of tasks, which `evaluate`, `export`")
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_results_may_average_the_last_evaluations(
    command: Command, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The matrix against what was played: tasks learnt before and, from its own training, the newest one."""
    played: list[tuple[bool, list[float]]] = []
    play, log = Evaluator.play, Tracker.log
    own: list[float] = []

    def watched(self: Evaluator, *arguments: Any, meanwhile: bool = False, **options: Any) -> Any:
        found = play(self, *arguments, meanwhile=meanwhile, **options)
        played.append((meanwhile, [result["return"] for result in found]))
        if meanwhile and method == "finetune":  # the network that learns acts
            learning, acting = self.networks.networks["actor"][0], self.networks.policy(0, meanwhile=True)
            assert all(torch.equal(a, b) for a, b in zip(learning.parameters(), acting.parameters(), strict=True))
        return found

    def logged(self: Tracker, metrics: Any, transitions: int) -> None:
        if "eval/mean_return" in metrics:
            own.append(metrics["eval/mean_return"])
        log(self, metrics, transitions)

    monkeypatch.setattr(Evaluator, "play", watched)
    monkeypatch.setattr(Tracker, "log", logged)
    options = ("evaluate.every=40", "averaged_evaluations=3", "algorithm.learning_rate=0.01")
    outcome = command("continual", *PPO, f"method={method}", *options, "run_dir=run")
    assert outcome.code == 0, outcome.err
    matrix = results("run")["return"]
    assert [meanwhile for meanwhile, _ in played] == [False, False, True, True, False, True, True, False]
    assert matrix[0] == played[0][1]
    assert matrix[1] == pytest.approx([(own[2] + own[3] + played[1][1][0]) / 3, *played[1][1][1:]])  # 0, 40 to 160
    for task, (first, end) in enumerate([(2, 4), (5, 7)], start=1):
        row = [sum(values[number] for _, values in played[first : end + 1]) / 3 for number in range(task)]
        newest = (own[5 * task + 2] + own[5 * task + 3] + played[end][1][task]) / 3
        assert matrix[task + 1] == pytest.approx([*row, newest, *played[end][1][task + 1 :]])
    forgot = results("run")["measures"]
    assert results("run")["averaged_evaluations"] == 3
    assert forgot["performance"] is not None
    unchanged = [values[0] for _, values in played[1:]]
    assert (len(set(unchanged)) == 1) == (method == "lora")
