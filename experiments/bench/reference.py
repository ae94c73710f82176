"""A straightforward SAC update in plain PyTorch, the yardstick of ours.

Written as the common single-file and library implementations are: the task as a one-hot code in the
observation, three networks of ``nn.Sequential``, two critics evaluated one after the other, Adam as it comes,
the actor loss differentiated through critics whose own gradients are computed and thrown away, one clip per
network, targets moved parameter by parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _mlp(inputs: int, hidden: list[int], outputs: int) -> nn.Sequential:
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class PlainSAC:
    """SAC on flat batches ``[N, ...]`` whose observations end in the task's one-hot code."""

    def __init__(self, num_tasks: int, obs_size: int, action_size: int, hidden: list[int], capacity: int) -> None:
        inputs = obs_size + num_tasks
        self.num_tasks = num_tasks
        self.actor = _mlp(inputs, hidden, 2 * action_size)
        self.critics = nn.ModuleList(_mlp(inputs + action_size, hidden, 1) for _ in range(2))
        self.targets = nn.ModuleList(_mlp(inputs + action_size, hidden, 1) for _ in range(2))
        self.targets.load_state_dict(self.critics.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(num_tasks))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=3e-4)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=3e-4)
        one_hot = torch.eye(num_tasks).unsqueeze(1).expand(-1, capacity, -1)
        self.memory = {
            "obs": torch.cat([torch.randn(num_tasks, capacity, obs_size), one_hot], -1),
            "action": torch.rand(num_tasks, capacity, action_size) * 2 - 1,
            "reward": torch.randn(num_tasks, capacity),
            "terminated": torch.zeros(num_tasks, capacity),
            "next_obs": torch.cat([torch.randn(num_tasks, capacity, obs_size), one_hot], -1),
        }

    def sample(self, batch_per_task: int) -> dict[str, Tensor]:
        """Transitions of every task, flat."""
        tasks = torch.arange(self.num_tasks).repeat_interleave(batch_per_task)
        rows = torch.randint(self.memory["reward"].shape[1], tasks.shape)
        return {name: values[tasks, rows] for name, values in self.memory.items()}

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """An action and its log-probability."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal: Any = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        log_prob = normal.log_prob(raw).sum(-1) - torch.log(1 - action.square() + 1e-6).sum(-1)
        return action, log_prob

    def update(self, batch_per_task: int = 128, discount: float = 0.99, rate: float = 0.005) -> None:
        """One step of entropy coefficients, critics, actor and targets."""
        batch = self.sample(batch_per_task)
        alpha_of_row = (batch["obs"][:, -self.num_tasks :] @ self.log_alpha.detach().unsqueeze(1)).squeeze(1).exp()
        action, log_prob = self.act(batch["obs"])
        by_task = log_prob.detach().view(self.num_tasks, -1).mean(1)
        alpha_loss = -(self.log_alpha * (by_task - action.shape[-1])).mean()
        self.alpha_optimizer.zero_grad()
        torch.autograd.backward(alpha_loss)
        self.alpha_optimizer.step()

        with torch.no_grad():
            next_action, next_log_prob = self.act(batch["next_obs"])
            next_action = torch.cat([batch["next_obs"], next_action], -1)
            next_q = torch.min(*(target(next_action).squeeze(-1) for target in self.targets))
            next_value = next_q - alpha_of_row * next_log_prob
            wanted = batch["reward"] + discount * (1 - batch["terminated"]) * next_value
        taken = torch.cat([batch["obs"], batch["action"]], -1)
        critic_loss = torch.stack([F.mse_loss(critic(taken).squeeze(-1), wanted) for critic in self.critics]).sum()
        self.critic_optimizer.zero_grad()
        torch.autograd.backward(critic_loss)
        nn.utils.clip_grad_norm_(self.critics.parameters(), 1.0)
        self.critic_optimizer.step()

        chosen = torch.cat([batch["obs"], action], -1)
        q = torch.min(*(critic(chosen).squeeze(-1) for critic in self.critics))
        self.actor_optimizer.zero_grad()
        torch.autograd.backward((alpha_of_row * log_prob - q).mean())
        nn.utils.clip_grad_norm_(self.actor.parameters(), 1.0)
        self.actor_optimizer.step()

        with torch.no_grad():
            pairs = zip(self.critics.parameters(), self.targets.parameters(), strict=True)
            for source, target in pairs:
                target.mul_(1 - rate).add_(rate * source)
