"""Measure how much of a policy's spread is at its bound: ``python -m experiments.mt10.spreads runs/<runs> ...``.

Every task is played by draws of the policy, with the weights of evaluation; ``spreads.csv`` has, by task, the
share of states and action dimensions whose log standard deviation is at ``algorithm.max_log_std``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

import varshare_rl as vs
from experiments.results import Row, write_csv
from varshare_rl.algorithms.ppo import PPO, PPOConfig
from varshare_rl.assemble import TrainedAgent, load_agent
from varshare_rl.config import Device
from varshare_rl.nn.actor import TanhNormal
from varshare_rl.nn.stochastic import posterior_mean
from varshare_rl.run.process import one_thread, own_random


@torch.no_grad()
def at_bound(agent: TrainedAgent, steps: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Return that share by task, ``[T]``, over so many steps of one environment of each."""
    algorithm, config = agent.algorithm, agent.config.algorithm
    if not isinstance(algorithm, PPO) or not isinstance(config, PPOConfig) or algorithm.spec.discrete:
        raise vs.UserError("spreads are those of PPO's policies of Box actions")
    engine = agent.suite.make_engine(1, seed, evaluation=True)
    shares = np.zeros(algorithm.spec.num_tasks)
    with own_random(seed), one_thread():
        policy, obs = algorithm.evaluation_policy(1, deterministic=False), engine.reset()
        for _ in range(steps):
            seen = torch.from_numpy(obs)
            with posterior_mean(algorithm.actor):
                distribution = cast(TanhNormal, algorithm.policy(algorithm.normalizer(seen)))
            shares += (distribution.log_std >= config.max_log_std).double().mean((1, 2)).numpy()
            step = engine.step(policy.act(seen).numpy())
            policy.observe(torch.from_numpy(step.terminated | step.truncated))
            obs = step.obs
    engine.close()
    return shares / steps


def main() -> None:
    """Measure the runs that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mt10.spreads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--steps", type=int, default=500, help="of every task")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the table goes")
    given = parser.parse_args()
    rows: list[Row] = []
    tasks: tuple[str, ...] = ()
    for run in given.runs:
        agent = load_agent(run, "last", Device.cpu)
        tasks = tuple(agent.suite.task_names)
        shares = at_bound(agent, given.steps)
        each = {task: round(float(share), 3) for task, share in zip(tasks, shares, strict=True)}
        rows.append({"run": run.name, "transitions": agent.state["transitions"], **each})
        print(rows[-1])
    write_csv(given.folder / "spreads.csv", ("run", "transitions", *tasks), rows)


if __name__ == "__main__":
    main()
