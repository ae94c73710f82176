"""Settings and small steps that several test modules share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from varshare_rl.assemble import build_algorithm, build_suite
from varshare_rl.cli import compose
from varshare_rl.config import TrainConfig
from varshare_rl.config_checks import check_config
from varshare_rl.envs.suite import Suite, VectorEngine
from varshare_rl.nn import VarShareLoRAConfig
from varshare_rl.nn.critic import CriticConfig
from varshare_rl.nn.stochastic import WeightNoise
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.optim.elbo import ElboConfig
from varshare_rl.optim.gradient import GradientConfig
from varshare_rl.types import Transition

#: Overrides that make a run on the toy suite take a fraction of a second.
TINY = (
    "env=pointmass",
    "env.envs_per_task=2",
    "network.hidden=[8]",
    "log.every=160",
    "evaluate.every=0",
    "evaluate.episodes=2",
    "checkpoint.every=0",
    "log.quiet=true",
    "device=cpu",
)
#: The same for an algorithm.
TINY_ALGORITHM = {
    "ppo": (
        "algorithm=ppo",
        "algorithm.rollout_transitions_per_task=40",
        "algorithm.epochs=2",
        "algorithm.minibatches=2",
    ),
    "sac": (
        "algorithm=sac",
        "algorithm.start_transitions_per_task=20",
        "algorithm.batch_per_task=8",
        "algorithm.replay_capacity_per_task=100",
        "algorithm.updates_per_transition_per_task=0.25",
    ),
}

#: Further ones for a sequence of three tasks.
SEQUENCE = (
    "env=light8", "env.tasks=[normal_left,normal_right,swapped_left]", "total_transitions=480",
    "env.envs_per_task=4", "evaluate.every=80", "memory_transitions=20", "selection_episodes=4",
    "similar_episodes=2",
)  # fmt: skip


def last_of_each(arguments: Iterable[str]) -> list[str]:
    """Arguments with the last value of every option alone: tests change what :data:`TINY` says."""
    return list({item.partition("=")[0].lstrip("+"): item for item in arguments}.values())


def hold_noise(module: nn.Module) -> None:
    """Draw the noise of every stochastic layer once, one draw per task, and use it from now on."""
    for _, layer in stochastic_layers(module):
        layer.noise = WeightNoise(layer.draw_noise(len(layer.log_prior_scale)))


def build(
    env: Any,
    algorithm: Any,
    network: Any = None,
    seed: int = 0,
    critic: CriticConfig | None = None,
    gradient: GradientConfig | None = None,
    **elbo: Any,
) -> tuple[Suite, VectorEngine, Any]:
    """A suite, a training engine of it and a fresh algorithm, from the components' options."""
    torch.manual_seed(seed)
    network = network or VarShareLoRAConfig(hidden=[16])
    config = TrainConfig(env, algorithm, network, ElboConfig(**elbo), critic or CriticConfig())
    config.gradient = gradient or config.gradient
    check_config(config)
    suite = build_suite(config)
    learner = build_algorithm(config, suite, torch.device("cpu"))
    return suite, suite.make_engine(env.envs_per_task, seed), learner


def collect(engine: VectorEngine, learner: Any, obs: Tensor, vector_steps: int) -> Tensor:
    """Act, step and observe; returns the current observations."""
    for _ in range(vector_steps):
        action = learner.act(obs)
        step = engine.step(action.numpy())
        ends = (torch.from_numpy(step.terminated), torch.from_numpy(step.truncated))
        successor = torch.from_numpy(step.next_obs)
        learner.observe(Transition(obs, action, torch.from_numpy(step.reward), *ends, successor))
        obs = torch.from_numpy(step.obs)
    return obs


def continual_document(
    method: str = "finetune",
    seed: int = 0,
    tasks: Sequence[str] = ("a", "b"),
    old: Sequence[str] = (),
    learnt: float = 0.8,
    lost: float = 0.5,
    **changes: Any,
) -> dict[str, Any]:
    """What a continual run writes, from made-up numbers.

    Every task has a success of 0.1 before it is learnt, ``learnt`` after it, and loses ``lost`` with the next one;
    old ones have 0.9 and end at 0.6. Curves rise in a straight line, so that their area is ``learnt / 2``.
    """
    rows = [
        [0.9 - 0.3 * moment / len(tasks) for _ in old]
        + [0.1 if moment <= place else learnt - lost * (moment > place + 1) for place in range(len(tasks))]
        for moment in range(len(tasks) + 1)
    ]
    document = {
        "format": "continual",
        "method": method,
        "algorithm": "sac",
        "suite": "pointmass",
        "tasks": [*old, *tasks],
        "old_tasks": len(old),
        "task_ids": "known",
        "carried": {"critic": "finetune", "optimizer": False, "replay": False},
        "measure": "success",
        "success": rows,
        "return": [[100.0 * value for value in row] for row in rows],
        "curves": [{"transitions": [0.0, 500.0, 1000.0], "success": [0.0, learnt / 2, learnt]} for _ in tasks],
        "measures": {},
        "per_task": [
            {
                "trained_parameters": 900 if place == 0 else 40 + 20 * (place - 1),
                "seconds": 5.0,
                "transitions": 1000,
                "stored_bytes": {"shared": 3000, "tasks": 100 * (place + 1), "memory": 50},
            }
            for place in range(len(tasks))
        ],
        "transitions": 1000 * len(tasks),
        "seconds": 10.0 + seed,
        "conditions": {"seed": seed, "horizon": 200},
    }
    return document | changes


def write_continual(folder: Path | str, document: Mapping[str, Any], config: str | None = None) -> Path:
    """A run folder with the document, and a configuration if there is one."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text(json.dumps(document))
    if config is not None:
        (path / "config.yaml").write_text(config)
    return path


def write_run(
    folder: Path | str,
    *overrides: str,
    seed: int = 0,
    scores: Mapping[str, float | None] | None = None,
    success: bool = True,
    finished: bool = True,
    transitions: int = 1000,
    nats: float | None = None,
    sharing: float | None = None,
    **conditions: Any,
) -> Path:
    """The folder of a training run, from made-up numbers; ``overrides`` are those of its configuration.

    Its evaluations, at a quarter, a half and all of its transitions, rise to ``scores`` by task in a straight line,
    and its return is ten times the success.
    """
    given = [*TINY, f"seed={seed}", f"total_transitions={transitions}", *overrides]
    config = compose("train", list({item.partition("=")[0]: item for item in given}.values()))
    scores = {"left": 0.5, "right": 1.0} if scores is None else scores
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))

    def row(value: float | None, share: float = 1.0) -> dict[str, float | None]:
        scaled = None if value is None else value * share
        high = None if scaled is None else 10 * scaled
        return {"success": scaled, "success_final": scaled, "return": high} if success else {"return": high}

    shares = (0.25, 0.5, 1.0) if finished else (0.25, 0.5)
    lines = [
        {"transitions": int(share * transitions), "seconds": 10 * share}
        | {f"eval/{task}/{name}": n for task, value in scores.items() for name, n in row(value, share).items()}
        for share in shares
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        blank = {"success": None, "success_final": None, "kl": nats}
        document = {
            "tasks": {task: blank | row(value) for task, value in scores.items()},
            "transitions": transitions,
            "seconds": 10.0,
            "parameters": {"stored": 400, "active_per_task": 200, "shared": 100, "per_task": 100},
            "conditions": {"seed": seed, "suite": config.env.name, "horizon": 40, "git_commit": "abc"} | conditions,
        }
        (path / "summary.json").write_text(json.dumps(document))
    if sharing is not None:
        (path / "sharing").mkdir()
        (path / "sharing" / "000000001000.json").write_text(json.dumps({"sharing": sharing}))
    return path
