"""The arithmetic of calibration by hand, and its figures on predictors whose calibration is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build
from torch import Tensor

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.reporting.calibration_figure import calibration_figure
from varshare_rl.run.calibration import (
    GRID,
    Comparison,
    calibration,
    compare,
    coverage,
    episode_ends,
    observed_returns,
    task_calibration,
)
from varshare_rl.run.episode_recording import record


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def test_returns_by_hand() -> None:
    """Two episodes: one terminates at step 1, the other runs out of time at step 4."""
    terminated = column([0, 1, 0, 0, 0]).bool()
    truncated = column([0, 0, 0, 0, 1]).bool()
    reward, entropy = column([1, 2, 3, 4, 5]), column([10, 20, 30, 40, 50])
    after = column([0, 0, 0, 0, 60])
    plain = observed_returns(reward, 0 * entropy, 0 * after, terminated, truncated, 0.5)
    assert plain.flatten().tolist() == [1 + 0.5 * 2, 2, 3 + 0.5 * (4 + 0.5 * 5), 4 + 0.5 * 5, 5]
    soft = observed_returns(reward, entropy, after, terminated, truncated, 0.5).flatten().tolist()
    last = 5 + 0.5 * 60
    before = 4 + 0.5 * (50 + last)
    assert soft == [1 + 0.5 * (20 + 2), 2, 3 + 0.5 * (40 + before), before, last]
    end, weight = episode_ends(terminated, truncated, 0.5)
    assert end.flatten().tolist() == [1, 1, 4, 4, 4]
    assert weight.flatten().tolist() == [0, 0, 0.125, 0.25, 0.5]


def test_a_gaussian_predictor_that_is_right_is_calibrated_and_a_proud_one_is_not() -> None:
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2.0, 40_000)
    observed = rng.normal(3.0, std)
    right = task_calibration(np.full(40_000, 3.0), std, observed)
    for level, share in right["coverage"].items():
        assert share == pytest.approx(float(level), abs=0.01)
    assert right["calibration_error"] < 0.01
    assert right["std_ratio"] == pytest.approx(1.0, abs=0.02)
    assert right["correlation"] > 0.3
    proud = task_calibration(np.full(40_000, 3.0), std / 10, observed)
    assert proud["calibration_error"] > 0.4
    assert proud["std_ratio"] == pytest.approx(10.0, rel=0.02)
    blind = task_calibration(np.zeros(10), np.ones(10), np.ones(10))
    assert blind["correlation"] is None
    assert coverage(np.array([-0.6, 0.7]), np.ones(2), (0.5,)).tolist() == [0.5]  # half-width 0.6745


@pytest.mark.parametrize("options", [PPOConfig(), SACConfig()])
def test_predictions_are_differences_of_values_of_one_draw(options: PPOConfig | SACConfig) -> None:
    """With no spread to speak of: value now minus discounted value where time ran out, row by row."""
    suite, _, made = build(PointMassConfig(envs_per_task=2, horizon=7), options)
    with torch.no_grad():
        for _, layer in posterior_layers(made.critic):
            for name in layer.rho_parameters:
                layer.get_parameter(name).fill_(-40.0)
    engine = suite.make_engine(2, 0, evaluation=True)
    recording = record(made, engine, 3)
    steps = recording.reward.shape[0]
    assert recording.counted.sum((0, 2)).tolist() == [3 * 7] * 8
    assert steps == 14
    comparison = compare(
        made, recording, 0.9, 2, entropy_weight=torch.full((8,), 0.5) if made.__class__.__name__ == "SAC" else None
    )
    made.critic.eval()

    def value(obs: Tensor, action: Tensor) -> Tensor:
        soft = isinstance(options, SACConfig)
        result: Tensor = (
            made.critic(obs, action, made.task_ids).mean(0) if soft else made.critic(obs, made.task_ids)
        )
        return result

    with torch.no_grad():
        for step, ahead in ((0, 6), (4, 2), (6, 0), (9, 4)):
            end = step + ahead
            assert recording.truncated[end].all()
            now = value(recording.obs[step], recording.action[step])
            later = value(recording.next_obs[end], recording.next_action[end])
            rows = slice(2 * step, 2 * step + 2)
            wanted = (now - 0.9 ** (ahead + 1) * later).numpy()
            np.testing.assert_allclose(comparison.mean[:, rows], wanted, rtol=1e-4, atol=1e-5)
            seen = sum(0.9**k * recording.reward[step + k] for k in range(ahead + 1))
            if isinstance(options, SACConfig):
                bonus = sum(0.9**k * recording.log_prob[step + k] for k in range(1, ahead + 1))
                seen = seen - 0.5 * (bonus + 0.9 ** (ahead + 1) * recording.next_log_prob[end])
            np.testing.assert_allclose(comparison.observed[:, rows], np.asarray(seen), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(comparison.tail_weight[:, rows], 0.9 ** (ahead + 1))
    if isinstance(options, PPOConfig):
        assert comparison.std.max() < 1e-5
    else:
        assert comparison.std.max() > 1e-3  # the twins are two draws
    engine.close()


def test_recording_repeats_and_counts_the_episodes_asked_for() -> None:
    suite, _, made = build(PointMassConfig(envs_per_task=2, horizon=5), PPOConfig())
    recordings = []
    for _ in range(2):
        torch.manual_seed(3)
        recordings.append(record(made, suite.make_engine(2, 0, evaluation=True), 2))
    assert all(
        torch.equal(getattr(recordings[0], name), getattr(recordings[1], name)) for name in ("obs", "action")
    )
    assert recordings[0].rows("obs").shape == (8, 10, recordings[0].obs.shape[-1])
    assert recordings[0].counted.all()
    assert torch.equal(recordings[0].rows("reward")[3, 2:4], recordings[0].reward[1, 3])


def test_figures_leave_out_what_is_not_counted(tmp_path: Path) -> None:
    zeros, counted = np.zeros((2, 6)), np.array([[True] * 3 + [False] * 3] * 2)
    observed = np.where(counted, 1.0, 1e9)
    comparison = Comparison(zeros, zeros + 2.0, observed, zeros + 0.5, counted)
    result = calibration(comparison, ("a", "b"))
    assert result["tasks"]["a"]["rows"] == 3
    assert result["tasks"]["b"]["rms_error"] == 1.0
    assert result["mean"]["coverage"] == {"0.5": 1.0, "0.8": 1.0, "0.9": 1.0, "0.95": 1.0}
    assert result["mean"]["std_ratio"] == 0.5
    assert result["mean"]["correlation"] is None
    assert result["tasks"]["a"]["tail_weight"] == 0.5
    assert len(result["mean"]["curve"]) == len(GRID)
    other = calibration(replace(comparison, std=zeros + 0.1), ("a", "b"))
    assert other["mean"]["coverage"]["0.95"] == 0.0
    axes = calibration_figure(result).axes[0]
    curves = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
    assert curves[1:] == [result["tasks"]["a"]["curve"], result["tasks"]["b"]["curve"], result["mean"]["curve"]]
