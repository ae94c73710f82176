"""``evaluate``: the form and the numbers of ``evaluation.json``, and the counting of episodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from helpers import SEQUENCE, TINY, TINY_ALGORITHM
from test_errors import assert_one_line
from torch import Tensor, nn

import varshare_rl as vs
from varshare_rl.envs.suite import Step
from varshare_rl.run.evaluation import evaluate
from varshare_rl.run.loop import Run


def read(path: str) -> dict[str, Any]:
    loaded = json.loads(Path(path).read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(params=["ppo", "sac"])
def run(command_once: Callable[..., Path], request: pytest.FixtureRequest) -> str:
    settings = (*TINY, *TINY_ALGORITHM[request.param], "evaluate.every=480", "total_transitions=960", "run_dir=run")
    return str(command_once("train", *settings))


def test_evaluation_has_the_form_and_the_numbers_of_the_summary(command: Command, run: str) -> None:
    outcome = command("evaluate", f"run={run}", "episodes=2")
    assert outcome.code == 0, outcome.err
    assert "run/evaluation.json" in outcome.out
    summary, evaluation = read("run/summary.json"), read("run/evaluation.json")
    assert evaluation.keys() == summary.keys()
    assert evaluation["tasks"] == summary["tasks"]  # the same policy, starts and number of episodes
    for name in ("mean_success", "mean_return", "transitions", "updates", "parameters"):
        assert evaluation[name] == summary[name]
    assert evaluation["conditions"]["episodes_per_task"] == 2
    assert evaluation["conditions"]["checkpoint"] == "last-000000000960"
    assert evaluation["conditions"].items() >= summary["conditions"].items()


def test_evaluation_repeats_and_its_options_count(command: Command, run: str) -> None:
    seen = {}
    for name, options in {
        "one": ("episodes=5",), "again": ("episodes=5",), "more": ("episodes=6",), "seed": ("episodes=5", "seed=9"),
    }.items():  # fmt: skip
        outcome = command("evaluate", f"run={run}", *options)
        assert outcome.code == 0, outcome.err
        seen[name] = read("run/evaluation.json")
    assert seen["one"] == seen["again"]
    for other in ("more", "seed"):
        assert seen[other]["mean_return"] != seen["one"]["mean_return"]
    provenance = seen["seed"]["conditions"]
    assert (provenance["seed"], provenance["evaluation_seed"]) == (seen["one"]["conditions"]["seed"], 9)
    kept = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert kept["transitions"] == 960  # evaluation adds nothing to the run's own record


def test_actions_can_be_drawn_with_the_noise_of_training(
    command_once: Callable[..., Path], command: Command
) -> None:
    settings = (*TINY, *TINY_ALGORITHM["ppo"], "algorithm.noise_correlation=0.9", "total_transitions=480")
    run_dir = command_once("train", *settings, "run_dir=run")
    agent = vs.load(run_dir)
    drawn = agent.evaluate(3, deterministic=False)
    assert drawn["conditions"]["actions"] == "stochastic"
    assert read("run/evaluation_stochastic.json") == drawn
    outcome = command("evaluate", f"run={run_dir}", "episodes=3", "deterministic=false")
    assert outcome.code == 0, outcome.err
    assert read("run/evaluation_stochastic.json") == drawn  # the same draws again
    assert agent.evaluate(3)["mean_return"] != drawn["mean_return"]
    policy = agent._trained.algorithm.evaluation_policy(2000, deterministic=False)
    obs = torch.zeros(8, 2000, 4)
    steps = []
    for _ in range(2):
        steps.append(policy.act(obs).atanh())
        policy.observe(torch.zeros(8, 2000, dtype=torch.bool))
    for action in range(2):
        pair = torch.stack([step[0, :, action] for step in steps])
        assert torch.corrcoef(pair)[0, 1].item() == pytest.approx(0.9, abs=0.03)  # the policy's mean is the same


def test_the_best_checkpoint_can_be_evaluated(command: Command, run: str) -> None:
    (best,) = Path("run/checkpoints").glob("best-*")
    outcome = command("evaluate", f"run={run}", "checkpoint=best", "episodes=2")
    assert outcome.code == 0, outcome.err
    assert not Path("run/evaluation.json").exists()  # which is the last one's
    evaluation = read("run/evaluation_best.json")
    assert evaluation["conditions"]["checkpoint"] == best.name
    assert evaluation["transitions"] == int(best.name.removeprefix("best-"))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (logged,) = (
        line["eval/mean_return"]
        for line in lines
        if "eval/mean_return" in line and line["transitions"] == evaluation["transitions"]
    )
    assert evaluation["mean_return"] == pytest.approx(logged)


def test_every_protocol_has_its_episodes_and_its_file(command: Command, run: str) -> None:
    assert command("evaluate", f"run={run}").code == 0
    found = {"fifty": read("run/evaluation.json")}
    for protocol in ("goals", "quick"):
        outcome = command("evaluate", f"run={run}", f"protocol={protocol}", "checkpoint=best")
        assert outcome.code == 0, outcome.err
        assert f"written: run/evaluation_best_{protocol}.json" in outcome.out
        found[protocol] = read(f"run/evaluation_best_{protocol}.json")
        assert found[protocol]["conditions"]["protocol"] == protocol
    assert {name: result["conditions"]["episodes_per_task"] for name, result in found.items()} == {
        "fifty": 50, "goals": 50, "quick": 5,
    }  # fmt: skip
    assert read("run/evaluation.json") == found["fifty"]
    outcome = command("evaluate", f"run={run}", "protocol=official")
    assert_one_line(
        outcome.code, outcome.err, "env=pointmass has no evaluation of its authors; give protocol=goals"
    )
    outcome = command("evaluate", f"run={run}", "protocol=quick", "episodes=7")
    assert_one_line(outcome.code, outcome.err, "protocol=quick and episodes=7 are both given")


def test_weights_may_be_drawn(command: Command, run: str) -> None:
    """Wide posteriors act otherwise when they are drawn, always in the same way for the same seed."""
    assert command("evaluate", f"run={run}", "episodes=2").code == 0
    seen = []
    for _ in range(2):
        assert command("evaluate", f"run={run}", "episodes=2", "draw=per_episode").code == 0
        seen.append(read("run/evaluation_per_episode.json"))
    mean = read("run/evaluation.json")
    assert seen[0] == seen[1]
    assert seen[0]["mean_return"] != mean["mean_return"]
    assert (seen[0]["conditions"]["draw"], "draw" in mean["conditions"]) == ("per_episode", False)


def test_a_network_without_posterior_has_no_draws(command: Command) -> None:
    shared = ("network=shared", "total_transitions=160", "run_dir=run")
    assert command("train", *TINY, *TINY_ALGORITHM["ppo"], *shared).code == 0
    outcome = command("evaluate", "run=run", "draw=per_episode")
    assert_one_line(outcome.code, outcome.err, "draw=per_episode: network=shared has no posterior to draw from")


def test_one_episode_is_named_so(command: Command, run: str) -> None:
    assert "1 episode per task of last-000000000960" in command("evaluate", f"run={run}", "episodes=1").out


class Script:
    """An engine whose episodes are scripted: per slot a list of episodes, each a list of (reward, success)."""

    def __init__(self, episodes: list[list[list[list[tuple[float, bool]]]]]) -> None:
        self.episodes = episodes
        self.num_tasks, self.envs_per_task = len(episodes), len(episodes[0])

    def reset(self) -> np.ndarray:
        self.at = np.zeros((self.num_tasks, self.envs_per_task, 2), dtype=int)  # episode, step
        return np.zeros((self.num_tasks, self.envs_per_task, 1), dtype=np.float32)

    def step(self, actions: np.ndarray) -> Step:
        shape = (self.num_tasks, self.envs_per_task)
        reward, success, done = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
        for slot in np.ndindex(shape):
            episode, step = self.at[slot]
            script = self.episodes[slot[0]][slot[1]]
            rows = script[episode] if episode < len(script) else [(1e6, True)]  # never to be counted
            reward[slot], success[slot] = rows[step]
            done[slot] = step + 1 == len(rows)
            self.at[slot] = (episode + 1, 0) if done[slot] else (episode, step + 1)
        obs = np.zeros((*shape, 1), dtype=np.float32)
        return Step(obs, obs, reward, done, np.zeros(shape, bool), success, np.zeros(shape, np.int64))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> np.ndarray:
        return self.reset()

    def close(self) -> None:
        pass


class Still:
    """A policy that does nothing."""

    def evaluation_policy(self, envs_per_task: int, deterministic: bool = True) -> Still:
        return self

    def act(self, obs: Tensor) -> Tensor:
        return torch.zeros(*obs.shape[:2], 1)

    def observe(self, done: Tensor) -> None:
        pass

    def trained_modules(self) -> dict[str, nn.Module]:
        return {"actor": nn.Linear(1, 1)}


class ScriptSuite:
    task_names = ("a", "b")
    has_success = True


@pytest.fixture
def script() -> Script:
    no, yes = False, True
    return Script(
        [
            # task a: episodes 0 and 2 in its first slot, 1 in its second; the fourth one is not asked for
            [[[(1.0, no)], [(4.0, no), (4.0, yes)]], [[(2.0, yes), (2.0, no), (2.0, no)], [(500.0, yes)]]],
            # task b: short episodes come first and must not crowd out the long one
            [[[(1.0, no)], [(1.0, no)]], [[(0.5, no)] * 9 + [(0.5, yes)]]],
        ]
    )


def test_counts_each_episode_once_and_waits_for_the_longest(script: Script) -> None:
    result = evaluate(Still(), ScriptSuite(), script, 3)  # type: ignore[arg-type]
    assert result.tasks["a"] == {
        "return": pytest.approx((1 + 6 + 8) / 3), "episode_steps": pytest.approx((1 + 3 + 2) / 3),
        "success": pytest.approx(2 / 3), "success_final": pytest.approx(1 / 3), "kl": None,
    }  # fmt: skip
    assert result.tasks["b"] == {
        "return": pytest.approx((1 + 5 + 1) / 3), "episode_steps": pytest.approx(12 / 3),
        "success": pytest.approx(1 / 3), "success_final": pytest.approx(1 / 3), "kl": None,
    }  # fmt: skip
    assert result.mean("success") == pytest.approx(0.5)
    assert result.score == (len(result.tasks), result.mean("success"), result.mean("return"))
    assert result.mean("kl") is None


def test_without_success_the_return_is_the_score(script: Script) -> None:
    suite = ScriptSuite()
    suite.has_success = False
    result = evaluate(Still(), suite, script, 3)  # type: ignore[arg-type]
    assert result.tasks["a"]["success"] is None
    assert result.score == pytest.approx((2.0, 0.0, (15 / 3 + 7 / 3) / 2))
    assert not any("success" in name for name in result.metrics())


LEARN = (*TINY, *TINY_ALGORITHM["ppo"], *SEQUENCE, "algorithm.normalize_observations=true", "run_dir=run")


def returns(document: dict[str, Any]) -> list[float]:
    return [task["return"] for task in document["tasks"].values()]


SEQUENCES = {
    "lora": ("method=lora",),
    "hidden": ("method=copies", "task_ids=hidden", "selection_episodes=24"),
    "hidden_one_network": ("method=finetune", "task_ids=hidden"),
    "origin": ("method=varshare", "from=trained", "env.tasks=[normal_right,swapped_left]"),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_a_sequence_is_evaluated_as_at_its_end(command: Command, case: str) -> None:
    if case == "origin":
        two = ("env.tasks=[normal_left,flipped_up]", "total_transitions=320", "run_dir=trained")
        assert command("train", *TINY, *TINY_ALGORITHM["ppo"], *two).code == 0
    outcome = command("continual", *LEARN, *SEQUENCES[case])
    assert outcome.code == 0, outcome.err
    outcome = command("evaluate", "run=run", "episodes=2", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert "2 episodes per task of last-000000000480" in outcome.out
    summary, found = read("run/summary.json"), read("run/evaluation.json")
    assert list(found["tasks"]) == found["learnt"] == summary["tasks"]
    assert returns(found) == summary["return"][-1]
    assert [task["success"] for task in found["tasks"].values()] == summary["success"][-1]
    assert found["mean_return"] == pytest.approx(np.mean(summary["return"][-1]))
    names = summary["tasks"]
    acted_as = summary["acted_as"][-1] if "acted_as" in summary else range(len(names))
    assert list(found["acted_as"].values()) == [names[int(number)] for number in acted_as]
    assert found["transitions"] == summary["transitions"] == 480
    own = {"evaluation_seed": 0, "episodes_per_task": 2, "checkpoint": "last-000000000480"}
    assert found["conditions"] == {**summary["conditions"], **own}
    changed = command("evaluate", "run=run", "episodes=2", "device=cpu", "seed=9")
    assert changed.code == 0, changed.err
    assert returns(read("run/evaluation.json")) != returns(found)


@pytest.mark.parametrize("learnt", [0, 2])
def test_a_sequence_that_was_stopped_is_evaluated_with_what_it_has_learnt(
    command: Command, monkeypatch: pytest.MonkeyPatch, learnt: int
) -> None:
    """Tasks to come have the last learnt one's policy, or an untrained one; as at that moment of the whole run."""
    train, trained = Run.train, 0

    def stopped(run: Run) -> Any:
        nonlocal trained
        trained += 1
        if trained > learnt:
            raise KeyboardInterrupt
        return train(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train", stopped)
        assert command("continual", *LEARN, "method=ewc").code == 130
    outcome = command("evaluate", "run=run", "episodes=2", "device=cpu")
    assert outcome.code == 0, outcome.err
    found = read("run/evaluation.json")
    assert command("continual", *LEARN[:-1], "method=ewc", "run_dir=whole").code == 0
    whole = read("whole/summary.json")
    assert returns(found) == whole["return"][learnt]
    first, second, _ = whole["tasks"]
    assert found["learnt"] == [first, second][:learnt]
    assert list(found["acted_as"].values()) == ([first, second, second] if learnt else [None] * 3)


WRONG_OF_SEQUENCES = {
    "best": (
        ("checkpoint=best",),
        "checkpoint=best: run is a sequence of tasks, which keeps its last checkpoint only",
    ),
    "unknown_checkpoint": (("checkpoint=first",), "checkpoint=first"),
    "episodes": (("episodes=0",), "episodes is 0"),
}


def test_wrong_input_for_a_sequence_is_one_line(command: Command) -> None:
    assert command("continual", *LEARN, "env.tasks=[normal_left]", "method=finetune").code == 0
    before = sorted(Path().rglob("*"))
    for arguments, named in WRONG_OF_SEQUENCES.values():
        outcome = command("evaluate", "run=run", *arguments)
        assert_one_line(outcome.code, outcome.err, named)
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("name: finetune", "name: nothing"))
    outcome = command("evaluate", "run=run")
    assert_one_line(outcome.code, outcome.err, "run/config.yaml is not a run configuration")
    config.write_text(
        config.read_text()
        .replace("name: nothing", "name: finetune")
        .replace("pretrained: null", "pretrained: gone")
    )
    outcome = command("evaluate", "run=run")
    assert_one_line(outcome.code, outcome.err, "no run folder gone, which from= goes on from")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
def test_an_environment_that_remembers_is_evaluated_as_in_training(command: Command) -> None:
    options = (
        *TINY, *TINY_ALGORITHM["ppo"], "env=gymnasium", "env.ids=[BipedalWalkerHardcore-v3]", "env.horizon=120",
        "env.workers=1", "evaluate.every=160", "evaluate.episodes=6", "total_transitions=480", "run_dir=run",
    )  # fmt: skip
    outcome = command("train", *options)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("BipedalWalkerHardcore-v3: a reset leaves something") == 1
    assert command("evaluate", "run=run", "episodes=6").code == 0
    found = [json.loads(Path(f"run/{name}.json").read_text())["tasks"] for name in ("summary", "evaluation")]
    assert found[0] == found[1]
