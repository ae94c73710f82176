"""``python -m experiments.ivon``: IVON in place of Adam for the factors, in PPO on point masses.

Everything else is the default: theta, biases and heads keep Adam. Writes ``ivon.csv``; a run takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import varshare_rl as vs
from experiments.curves import read_curves
from experiments.ivon.ivon import Ivon
from experiments.results import write_csv
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import load_agent
from varshare_rl.config import Device
from varshare_rl.nn.parameters import total_kl
from varshare_rl.optim.elbo import Likelihood
from varshare_rl.optim.step import LossStep

COLUMNS = ("factors", "kl_weight", "seed", "success", "area", "nats", "least_nats", "most_nats", "git_commit")
#: Options of IVON by name; None is Adam.
WAYS: Mapping[str, Mapping[str, float] | None] = {
    "adam": None,
    **{f"ivon rate={rate:g}": {"rate": rate} for rate in (0.01, 0.1, 0.3, 1.0)},
    "ivon rate=0.3 width=1": {"rate": 0.3, "width": 1.0},
}
BASE = ("env=pointmass", "observe.every=0", "checkpoint.every=0", "log.trackers=[]", "log.quiet=true")


@contextmanager
def factors_by(options: Mapping[str, float] | None) -> Iterator[None]:
    """Inside, the factors of runs are stepped by IVON: the loss has no divergence, which is in the steps."""
    if options is None:
        yield
        return
    steps: dict[int, tuple[ActorCritic, str]] = {}
    ivons: dict[int, Ivon] = {}
    costs: dict[int, Tensor] = {}
    plain_step = LossStep.step

    def penalty(self: ActorCritic, part: str, held: int, nat: Tensor | float = 1.0) -> float:
        step = self.actor_step if part == "actor" else self.critic_step
        seen = max(self.transitions_per_task, 1)
        fitted = nat if self.elbo.config.likelihood is Likelihood.fitted else 1.0
        costs[id(step)] = torch.full((self.spec.num_tasks,), self.elbo.config.kl_weight / seen) * fitted
        steps[id(step)] = self, part
        return 0.0

    def step(self: LossStep, norm: Tensor) -> None:
        if id(self) in steps:
            agent, part = steps[id(self)]
            if id(self) not in ivons:
                ivons[id(self)] = Ivon(agent.actor if part == "actor" else agent.critic, **options)
            ivons[id(self)].step(costs[id(self)])
        plain_step(self, norm)

    with patch.object(ActorCritic, "penalty", penalty), patch.object(LossStep, "step", step):
        yield


def trial(way: str, kl_weight: float, seed: int, run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and return a row of the table; ``area`` is the mean success of the evaluations on the way."""
    with factors_by(WAYS[way]):
        vs.train(*BASE, *overrides, f"seed={seed}", f"elbo.kl_weight={kl_weight:g}", run_dir=str(run_dir))
    curve = [success for _, success in read_curves(run_dir, "success")["mean"]]
    summary = json.loads((run_dir / "summary.json").read_text())
    agent = load_agent(run_dir, "last", Device.cpu)
    nats = total_kl(agent.algorithm.trained_modules()["actor"], len(agent.suite.task_names)).detach()
    return {
        "factors": way, "kl_weight": kl_weight, "seed": seed, "success": round(summary["mean_success"], 4),
        "area": round(sum(curve) / len(curve), 4), "nats": round(float(nats.mean()), 2),
        "least_nats": round(float(nats.min()), 2), "most_nats": round(float(nats.max()), 2),
        "git_commit": summary["conditions"]["git_commit"],
    }  # fmt: skip


def main() -> None:
    """Train all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["total_transitions=200000", "evaluate.every=20000"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--weights", nargs="*", type=float, default=[0.1, 1.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/ivon"))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        for way in given.ways:
            for weight in given.weights:
                run_dir = given.runs / f"{way.replace(' ', '_')}_{weight:g}_{seed}"
                rows.append(trial(way, weight, seed, run_dir, given.overrides))
                print(rows[-1], flush=True)
                write_csv(given.folder / "ivon.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
