from __future__ import annotations

import numpy as np
import torch

from varshare_rl.data.rewards import ReturnStdScaler


def test_rewards_are_divided_by_the_spread_of_the_discounted_return() -> None:
    tasks, envs, steps, discount = 2, 3, 60, 0.9
    generator = np.random.default_rng(0)
    rewards = generator.normal(size=(steps, tasks, envs)) * np.array([1.0, 30.0])[:, None]
    done = generator.random((steps, tasks, envs)) < 0.1
    normalizer = ReturnStdScaler(tasks, discount)
    running, seen = np.zeros((tasks, envs)), []
    for reward, end in zip(rewards, done, strict=True):
        normalizer.update(torch.from_numpy(reward), torch.from_numpy(end))
        running = running * discount + reward
        seen.append(running.copy())
        running[end] = 0.0
    spread = np.stack(seen, 1).reshape(tasks, -1).std(1)
    x = torch.ones(tasks, 4)
    np.testing.assert_allclose(normalizer(x).numpy(), np.repeat(1 / spread[:, None], 4, 1), rtol=1e-5)
    assert normalizer(1e6 * x).tolist() == [[10.0] * 4] * 2  # clipped
    assert normalizer(torch.ones(tasks, 4, 5)).shape == (tasks, 4, 5)


def test_the_state_comes_back() -> None:
    one, other = ReturnStdScaler(2, 0.9), ReturnStdScaler(2, 0.9)
    for _ in range(5):
        one.update(torch.randn(2, 3), torch.rand(2, 3) < 0.3)
    state = one.state_dict()
    other.restore(state)
    reward, done = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in (one, other):
        normalizer.update(reward, done)
    assert torch.equal(one(reward), other(reward))
    assert torch.equal(one.returns, other.returns)
