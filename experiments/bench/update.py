"""The whole gradient update of SAC and PPO: every architecture, and a straightforward one in plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from experiments.bench.contenders import Contender, Round, Setting, measure
from experiments.bench.learners import ACTION_SIZE, OBS_SIZE, filled_ppo, filled_sac
from experiments.bench.reference import PlainSAC
from experiments.bench.report import Goal, Ratio, Section
from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.nn import NetworkConfig
from varshare_rl.registry import registered

TASKS, BATCH = 10, 128
WIDE, NARROW = [400, 400, 400], [128, 128]
#: As many rows in a minibatch, and as many passes over each transition, as PPO has by default.
ROLLOUT, MINIBATCHES, EPOCHS = 500, 2, PPOConfig().epochs

#: All of them at the same hidden sizes, with their own defaults (rank 8 of what has one).
ARCHITECTURES: Mapping[str, Callable[..., NetworkConfig]] = registered("network")


def rounds_of(update: Callable[[], object], repeats: int) -> Round:
    """Milliseconds per call."""

    def work() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            update()
        return (time.perf_counter() - begin) / repeats * 1e3

    return work


def hidden_sizes(hidden: list[int], setting: Setting) -> list[int]:
    """The sizes, or tiny ones when quick."""
    return [16] if setting.quick else hidden


def _sac(name: str, precision: str, setting: Setting) -> Round:
    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = precision
    architecture = ARCHITECTURES[name](hidden=hidden_sizes(WIDE, setting), activation="relu")
    algorithm = filled_sac(architecture, TASKS, setting.pick(BATCH, 4), setting.pick(10_000, 20))
    return rounds_of(algorithm.update, setting.pick(5, 1))


def _plain_sac(setting: Setting) -> Round:
    algorithm = PlainSAC(TASKS, OBS_SIZE, ACTION_SIZE, hidden_sizes(WIDE, setting), setting.pick(10_000, 20))
    return rounds_of(partial(algorithm.update, setting.pick(BATCH, 4)), setting.pick(5, 1))


def _ppo(name: str, hidden: list[int], setting: Setting) -> Round:
    architecture = ARCHITECTURES[name](hidden=hidden_sizes(hidden, setting), activation="tanh")
    epochs = setting.pick(EPOCHS, 1)
    algorithm = filled_ppo(architecture, TASKS, setting.pick(ROLLOUT, 8), MINIBATCHES, epochs)

    def update() -> None:
        algorithm.rollout.position = algorithm.rollout.vector_steps  # the same rollout again
        algorithm.update()

    per_minibatch = rounds_of(update, 1)
    return lambda: per_minibatch() / (MINIBATCHES * epochs)


SAC = {f"SAC {name}": partial(_sac, name, "none") for name in ARCHITECTURES}
PPO = {
    f"PPO {size} {name}": partial(_ppo, name, hidden)
    for size, hidden in (("2 x 128", NARROW), ("3 x 400", WIDE))
    for name in ARCHITECTURES
}
CONTENDERS: dict[str, Contender] = {
    "SAC straightforward": _plain_sac,
    **SAC,
    "SAC shared bf16": partial(_sac, "shared", "bf16"),
    "SAC varshare_lora bf16": partial(_sac, "varshare_lora", "bf16"),
    **PPO,
}


def run(rounds: int, setting: Setting) -> list[Section]:
    """SAC at the published size, PPO at the default and the published size."""
    sac = [name for name in CONTENDERS if name.startswith("SAC")]
    values = measure(__name__, sac, rounds, setting)
    ratios = [
        Ratio("SAC shared", "SAC straightforward", Goal(0.75)),
        Ratio("SAC shared bf16", "SAC straightforward", Goal(0.45)),
        Ratio("SAC shared bf16", "SAC shared"),
        Ratio("SAC varshare_lora bf16", "SAC shared bf16"),
        *(Ratio(name, "SAC shared", _goal(name)) for name in SAC if name != "SAC shared"),
    ]
    title = f"SAC update: 3 x 400, {TASKS} tasks x {BATCH} rows"
    sections = [Section(title, "ms", values, ratios)]
    for size in ("2 x 128", "3 x 400"):
        names = [name for name in PPO if size in name]
        shared = f"PPO {size} shared"
        ratios = [Ratio(name, shared, _goal(name)) for name in names if name != shared]
        rows = TASKS * ROLLOUT // MINIBATCHES
        title = f"PPO minibatch of {rows} rows ({TASKS} tasks): {size}, its share of the value pass included"
        sections.append(Section(title, "ms", measure(__name__, names, rounds, setting), ratios))
    return sections


def _goal(name: str) -> Goal | None:
    return Goal(1.4) if name.endswith("varshare_lora") else None
