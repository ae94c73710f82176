"""Calibration of the critic's posterior: its predicted errors against observed ones.

On recorded evaluation episodes each weight draw ``p`` of the critic predicts something that was then observed: the
discounted rewards from a state to the end of its episode,

    prediction_p = V_p(s_t) - discount^n V_p(s_end)        (the last term only where time ran out)
    observed     = r_t + discount r_{t+1} + ... + discount^(n-1) r_{t+n-1}

so nothing the critic says of itself enters what it is compared with. For a soft action value ``Q(s_t, a_t)`` the
observed side has the entropy terms that such a value includes: ``-alpha log pi`` of every later action, that at
``s_end`` among them. Rewards are in the critic's units (normalised as in training).

The posterior over weights is epistemic. An observed return also varies with the policy's sampling and the
environment, which no draw of the critic's weights knows of, so coverage below the nominal level is what even a
perfect posterior shows wherever returns are noisy. ``std_ratio`` says how many times larger ``std`` would have to
be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.nn.critic import TwinQ
from varshare_rl.nn.uncertainty import predict_values
from varshare_rl.run.episode_recording import EpisodeRecording

#: Nominal coverages that are reported one by one.
LEVELS = (0.5, 0.8, 0.9, 0.95)
#: Those that the calibration error and the reliability diagram average and show.
GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Predictions and observations, each ``[T, S * E]``; ``counted`` says which rows to use.

    ``tail_weight`` is ``discount^n`` where time ran out, else 0: the weight of ``V(s_end)`` in the prediction.
    """

    mean: FloatArray
    std: FloatArray
    observed: FloatArray
    tail_weight: FloatArray
    counted: npt.NDArray[np.bool_]


def observed_returns(
    reward: Tensor, entropy: Tensor, next_entropy: Tensor, terminated: Tensor, truncated: Tensor, discount: float
) -> Tensor:
    """Return the discounted sums to the end of the episode along dimension 0, all arguments ``[S, T, E]``.

    ``reward_t + discount * (entropy_{t+1} + return_{t+1})`` within an episode; at its end ``reward``, and where
    time ran out ``discount * next_entropy`` besides. The entropies are weighted bonuses, 0 for a plain value.
    """
    total = torch.zeros_like(reward)
    running = torch.zeros_like(reward[0])
    for step in range(len(reward) - 1, -1, -1):
        later = torch.where(truncated[step], next_entropy[step], running)
        total[step] = reward[step] + discount * torch.where(terminated[step], 0.0, later)
        running = total[step] + entropy[step]
    return total


def episode_ends(terminated: Tensor, truncated: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """Return the last step of the episode by step, and ``discount^n`` if time runs out (else 0), ``[S, T, E]``."""
    end = torch.zeros_like(terminated, dtype=torch.int64)
    weight = torch.zeros_like(terminated, dtype=torch.float64)
    last, tail = torch.full_like(end[0], len(end) - 1), torch.zeros_like(weight[0])
    for step in range(len(end) - 1, -1, -1):
        last = torch.where(terminated[step] | truncated[step], step, last)
        tail = discount * torch.where(truncated[step], 1.0, torch.where(terminated[step], 0.0, tail))
        end[step], weight[step] = last, tail
    return end, weight


def compare(
    algorithm: ActorCritic,
    recording: EpisodeRecording,
    discount: float,
    draws: int,
    temperature: float = 1.0,
    entropy_weight: Tensor | None = None,
) -> Comparison:
    """Predict the recorded returns with ``draws`` draws of the critic's weights.

    ``entropy_weight [T]`` is a soft critic's ``alpha``, None for a plain one.
    """
    alpha = torch.zeros(recording.reward.shape[1]) if entropy_weight is None else entropy_weight.cpu()
    bonus, next_bonus = (-alpha.view(1, -1, 1) * log for log in (recording.log_prob, recording.next_log_prob))
    observed = observed_returns(
        recording.reward.double(), bonus.double(), next_bonus.double(), recording.terminated, recording.truncated,
        discount,
    )  # fmt: skip
    end, weight = episode_ends(recording.terminated, recording.truncated, discount)
    envs = end.shape[2]
    end_row = (end * envs + torch.arange(envs)).transpose(0, 1).flatten(1)  # its place in [T, S * E]
    places, position = _time_ups(recording)
    now, later = _inputs(algorithm, recording)
    ends = tuple(_gather(x, places) for x in later)
    inputs = tuple(torch.cat(pair, 1).to(algorithm.spec.device) for pair in zip(now, ends, strict=True))
    value = predict_values(algorithm.critic, inputs, draws, temperature).draws.cpu().double()  # type: ignore[arg-type]
    rows = end_row.shape[1]
    tail = value[:, :, rows:].gather(2, position.gather(1, end_row).expand(len(value), -1, -1))
    flat_weight = weight.transpose(0, 1).flatten(1)
    prediction = value[:, :, :rows] - flat_weight * tail
    return Comparison(
        prediction.mean(0).numpy(), prediction.std(0).numpy(), observed.transpose(0, 1).flatten(1).numpy(),
        flat_weight.numpy(), recording.rows("counted").numpy(),
    )  # fmt: skip


def _inputs(algorithm: ActorCritic, recording: EpisodeRecording) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the critic's inputs at every step and at every successor, ``[T, S * E, ...]``."""
    if isinstance(algorithm.critic, TwinQ):
        return (
            (recording.rows("obs"), recording.rows("action")),
            (recording.rows("next_obs"), recording.rows("next_action")),
        )
    return (recording.rows("obs"),), (recording.rows("next_obs"),)


def _time_ups(recording: EpisodeRecording) -> tuple[Tensor, Tensor]:
    """Return rows where time ran out, ``[T, N]`` padded with 0, and their places by row, ``[T, S * E]``."""
    up = recording.rows("truncated")
    most = max(int(up.sum(1).max()), 1)
    position = (up.long().cumsum(1) - 1).clamp_min(0)
    places = torch.zeros(len(up), most, dtype=torch.int64)
    task, row = up.nonzero(as_tuple=True)
    places[task, position[task, row]] = row
    return places, position


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def coverage(error: FloatArray, std: FloatArray, levels: tuple[float, ...]) -> FloatArray:
    """Return the share of ``|error|`` in the central interval of a Gaussian of that ``std``, by nominal level."""
    half_widths = [
        math.sqrt(2.0) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64))) for level in levels
    ]
    return np.array([np.mean(np.abs(error) <= width * std) for width in half_widths])


def task_calibration(mean: FloatArray, std: FloatArray, observed: FloatArray) -> dict[str, Any]:
    """Return the figures of one task's rows.

    ``calibration_error`` is the mean of ``|observed - nominal|`` coverage over :data:`GRID` (Kuleshov, Fenner and
    Ermon 2018); ``correlation`` that of ``std`` and ``|error|`` (None where one of them does not vary);
    ``std_ratio`` the root mean square of the error over that of ``std``.
    """
    error = observed - mean
    curve = coverage(error, std, GRID)
    size = np.abs(error)
    varies = min(size.std(), std.std()) > 1e-12
    rms_std = float(np.sqrt(np.mean(std**2)))
    rms_error = float(np.sqrt(np.mean(error**2)))
    return {
        "rows": len(error),
        "bias": float(np.mean(error)),
        "rms_error": rms_error,
        "mean_std": float(np.mean(std)),
        "std_ratio": rms_error / rms_std if rms_std > 0 else None,
        "coverage": dict(
            zip((f"{level:g}" for level in LEVELS), coverage(error, std, LEVELS).tolist(), strict=True)
        ),
        "calibration_error": float(np.mean(np.abs(curve - np.array(GRID)))),
        "correlation": float(np.corrcoef(std, size)[0, 1]) if varies else None,
        "curve": curve.tolist(),
    }


def calibration(comparison: Comparison, task_names: tuple[str, ...]) -> dict[str, Any]:
    """Return figures per task and their means over tasks, with the nominal levels of the curves."""
    tasks = {}
    for index, name in enumerate(task_names):
        use = comparison.counted[index]
        rows = (array[index][use] for array in (comparison.mean, comparison.std, comparison.observed))
        tasks[name] = task_calibration(*rows)
        tasks[name]["tail_weight"] = float(comparison.tail_weight[index][use].mean())
    chosen = list(tasks.values())
    mean = {
        "coverage": {
            level: float(np.mean([row["coverage"][level] for row in chosen])) for level in chosen[0]["coverage"]
        },
        "calibration_error": float(np.mean([row["calibration_error"] for row in chosen])),
        "curve": np.mean([row["curve"] for row in chosen], axis=0).tolist(),
    }
    for name in ("std_ratio", "correlation"):
        known = [row[name] for row in chosen if row[name] is not None]
        mean[name] = float(np.mean(known)) if known else None
    return {"mean": mean, "tasks": tasks, "levels": list(GRID)}
