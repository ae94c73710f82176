"""Cost per transition, and memory, for more and more tasks at the same total batch."""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path

import torch

from experiments.bench.contenders import Contender, Round, Setting, measure
from experiments.bench.learners import filled_ppo, filled_sac, step
from experiments.bench.report import Goal, Ratio, Section
from varshare_rl.nn import NetworkConfig, SharedConfig, VarShareLoRAConfig

TASKS = (10, 50, 200, 500)
#: Transitions of all tasks together: in a PPO rollout (8 minibatches of 2500), in SAC's batch, in its memory.
ROLLOUT, MINIBATCHES, BATCH, MEMORY = 20_000, 8, 1_000, 500_000
#: The architecture whose stacks are updated for ten tasks at a time, for as many rows in all.
WINDOWED = f"varshare_lora, {TASKS[0]} tasks in an update"
#: SAC's updates per transition of all tasks together.
UPDATES = 0.05


def _architecture(name: str, setting: Setting) -> NetworkConfig:
    hidden = [8] if setting.quick else [128, 128] if "PPO" in name else [256, 256]
    return VarShareLoRAConfig(hidden=hidden) if "varshare_lora" in name else SharedConfig(hidden=hidden)


def _ppo(network: str, num_tasks: int, setting: Setting) -> Round:
    steps = setting.pick(ROLLOUT, 4_000) // num_tasks
    algorithm = filled_ppo(_architecture(f"PPO {network}", setting), num_tasks, steps, min(MINIBATCHES, steps))
    algorithm.update()

    def work() -> float:
        begin = time.perf_counter()
        while not algorithm.ready():
            step(algorithm, num_tasks)
        algorithm.update()
        return (time.perf_counter() - begin) / (steps * num_tasks) * 1e6

    return work


def _sac(network: str, num_tasks: int, setting: Setting) -> Round:
    at_once = TASKS[0] if network == WINDOWED else num_tasks
    algorithm = filled_sac(
        _architecture(f"SAC {network}", setting),
        num_tasks,
        BATCH // at_once,
        setting.pick(MEMORY, 5_000) // num_tasks,
        at_once,
    )
    transitions = setting.pick(1_000, 500)

    def work() -> float:
        begin = time.perf_counter()
        for _ in range(transitions // num_tasks):
            step(algorithm, num_tasks)
        for _ in range(int(transitions * UPDATES)):
            algorithm.update()
        return (time.perf_counter() - begin) / transitions * 1e6

    return work


def _memory(num_tasks: int, setting: Setting) -> Round:
    """Memory that SAC with its adapters takes after an update, divided by the prediction."""
    architecture = _architecture("SAC varshare_lora", setting)
    filled_sac(architecture, 2, BATCH // 2, BATCH).update()  # code and buffers that are there whatever the size
    gc.collect()
    before = _resident()
    capacity = MEMORY // num_tasks
    algorithm = filled_sac(architecture, num_tasks, BATCH // num_tasks, capacity)
    algorithm.update()
    gc.collect()
    ratio = (_resident() - before) / sum(algorithm.memory_bytes().values())
    return lambda: ratio


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


COSTS: dict[str, Contender] = {
    f"{algorithm} {network}, {tasks} tasks": partial(make, network, tasks)
    for algorithm, make in (("PPO", _ppo), ("SAC", _sac))
    for network in ("shared", "varshare_lora", WINDOWED)
    for tasks in TASKS
    if network != WINDOWED or (algorithm == "SAC" and tasks > TASKS[0])
}
MEMORIES: dict[str, Contender] = {
    f"SAC varshare_lora, {tasks} tasks, memory": partial(_memory, tasks) for tasks in TASKS
}
CONTENDERS: dict[str, Contender] = {**COSTS, **MEMORIES}


def run(rounds: int, setting: Setting) -> list[Section]:
    """Acting, storing and updating on made-up transitions, one environment per task, without an engine."""
    torch.manual_seed(0)
    sections = []
    for prefix in ("PPO", "SAC"):
        names = [name for name in COSTS if name.startswith(prefix)]
        values = measure(__name__, names, rounds, setting)
        ratios = [
            Ratio(name, f"{name.split(',')[0]}, {TASKS[0]} tasks", Goal(1.2))
            for name in names
            if not name.endswith(f" {TASKS[0]} tasks")
        ]
        sections.append(Section(f"{prefix}: cost per transition at equal total batch", "us", values, ratios))
    measured = measure(__name__, list(MEMORIES), 1, setting)
    goals = {} if setting.quick else {name: Goal(1.15) for name in measured}
    sections.append(Section("Memory", "measured / predicted", measured, goals=goals))
    return sections
