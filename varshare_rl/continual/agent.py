"""Networks that a sequence of tasks begins with: their specs, and the trained agent that it goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, build_algorithm, load_agent
from varshare_rl.config import TrainConfig
from varshare_rl.continual.config import ContinualConfig
from varshare_rl.continual.tasks import differing_spaces
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.nn.actor import Actor
from varshare_rl.nn.config import NetworkConfig
from varshare_rl.nn.critic import Critic, CriticHead
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.transfer.likelihood import policy_likelihood, value_likelihood
from varshare_rl.transfer.method import Likelihood, NetworkSpec, Pretrained, Stack, state_copy
from varshare_rl.transfer.networks import CriticCarry
from varshare_rl.transfer.pretrained import pretrained_from

#: Observations that count for the statistics of earlier tasks when a new one goes on from them.
INHERITED_OBSERVATIONS = 10_000


class NetworkProbe:
    """Notes the networks that an algorithm asks for, and gives it plain ones."""

    def __init__(self, config: TrainConfig) -> None:
        network: NetworkConfig = config.network
        self.architectures = {"actor": network, "critic": cast(Any, config.critic.architecture(config.network))}
        self.asked: dict[str, list[tuple[int, int, Stack]]] = {"actor": [], "critic": []}
        self.temperature = config.elbo.temperature  # of the draws of a method's layers

    def network(self, part: str, in_features: int, out_features: int) -> nn.Module:
        """Make a plain network."""
        architecture = self.architectures[part]
        stack: Stack = partial(architecture.stack, in_features, out_features, temperature=self.temperature)
        self.asked[part].append((in_features, out_features, stack))
        return stack(SharedLayer)

    def penalty(self, part: str, transitions_per_task: int) -> float:
        """Return no penalty."""
        return 0.0

    def advance(self, fraction: float) -> None:
        """Move nothing."""

    def specs(self, actor: Actor, critic: Critic) -> dict[str, list[NetworkSpec]]:
        """Return the specs of all networks, by part, of the policy and the critic that the algorithm has built."""
        heads = cast(Iterable[CriticHead], critic.heads)
        likelihoods: dict[str, list[Likelihood]] = {
            "actor": [policy_likelihood(actor)], "critic": [value_likelihood(head) for head in heads]
        }  # fmt: skip
        return {
            part: [NetworkSpec(*one, meaning) for one, meaning in zip(asked, likelihoods[part], strict=True)]
            for part, asked in self.asked.items()
        }


def probe(
    config: TrainConfig, suite: Suite, device: torch.device
) -> tuple[Actor, Critic, dict[str, list[NetworkSpec]]]:
    """Return a policy and a critic of the kinds that the algorithm makes, and the specs of all their networks."""
    networks = NetworkProbe(config)
    with torch.random.fork_rng(devices=[]):
        algorithm = build_algorithm(config, suite, device, networks)
    assert isinstance(algorithm, ActorCritic)
    return algorithm.actor, algorithm.critic, networks.specs(algorithm.actor, algorithm.critic)


def load_pretrained(config: ContinualConfig, device: Any) -> TrainedAgent | None:
    """Load the agent of ``from=``, if one is given.

    Raises:
        UserError: there is none, or it was trained by another algorithm.
    """
    if config.pretrained is None:
        return None
    if not Path(config.pretrained).is_dir():
        raise UserError(f"no run folder {config.pretrained}, which from= goes on from; it is looked for from here")
    agent = load_agent(Path(config.pretrained), "last", device)
    if not isinstance(agent.algorithm, ActorCritic):
        raise UserError(
            f"from={config.pretrained} has no policy and critic to go on from; give a run of ppo or sac"
        )
    if type(agent.config.algorithm) is not type(config.algorithm):
        raise UserError(
            f"from={config.pretrained} was trained with algorithm={agent.config.algorithm.name}, and "
            f"algorithm={config.algorithm.name} is chosen; choose the same"
        )
    return agent


def go_on_from(config: ContinualConfig, agent: TrainedAgent) -> ContinualConfig:
    """Return the configuration with networks as the agent has them, and observations as it sees them."""
    theirs = agent.config.network
    names = ("hidden", "activation", "layer_norm", "blocks")
    network = replace(config.network, **{name: getattr(theirs, name) for name in names})
    # Parts of its policies that are in no network: its base's view of observations, and the noise of its actions.
    kept = (
        "normalize_observations", "observation_statistics", "min_observation_std", "policy", "log_std",
        "initial_log_std",
    )  # fmt: skip
    own = {name: getattr(agent.config.algorithm, name) for name in kept if hasattr(config.algorithm, name)}
    algorithm = replace(config.algorithm, **own)
    return replace(config, algorithm=algorithm, network=network, critic=agent.config.critic)


def check_spaces(config: ContinualConfig, agent: TrainedAgent, suite: Suite) -> None:
    """Refuse to go on from an agent of other spaces.

    Raises:
        UserError: names the difference.
    """
    for space, theirs, ours in differing_spaces(agent.suite, suite):
        does = "observes" if space == "observation_space" else "does"
        raise UserError(
            f"from={config.pretrained} {does} other things than env={config.env.name} ({theirs} and {ours}); "
            "choose an env as there"
        )


def all_pretrained(agent: TrainedAgent | None, carry: CriticCarry) -> dict[str, list[Pretrained]]:
    """Return an agent's networks for those of a sequence, by part: none of critics that start anew."""
    if agent is None:
        return {}
    algorithm, count = cast(ActorCritic, agent.algorithm), len(agent.suite.task_names)
    found = {"actor": [pretrained_from(algorithm.actor.network, count)]}
    if carry is not CriticCarry.fresh:
        critic: Any = algorithm.critic
        networks = [critic.network] if hasattr(critic, "network") else list(critic.networks)
        found["critic"] = [pretrained_from(network, count) for network in networks]
    return found


def pretrained_normalizers(agent: TrainedAgent | None) -> list[dict[str, Tensor]]:
    """Return the statistics of an agent's observations, one state for every task."""
    if agent is None:
        return []
    state = cast(ActorCritic, agent.algorithm).normalizer.state_dict()
    return [
        {name: value if value.dim() == 0 else value[task : task + 1].clone() for name, value in state.items()}
        for task in range(len(agent.suite.task_names))
    ]


def beside_networks(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of what is beside the networks: a policy's log standard deviations, a critic's units."""
    return {name: value for name, value in state_copy(module).items() if not name.startswith("network")}


def log_stds_of(actor: nn.Module) -> list[Tensor]:
    """Return copies of the log standard deviations ``[1, A]`` of a policy's tasks, if they are a parameter."""
    log_stds = getattr(actor, "log_stds", None)
    return [] if log_stds is None else list(log_stds.detach().clone().split(1))


def pooled_normalizer(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return statistics of the observations of several tasks together, which new ones soon outweigh.

    The variance is the mean variance plus the variance of the means.
    """
    # Folders of former versions have counts without dimensions.
    counts = torch.stack([state["moments.count"].reshape(1, 1) for state in states])
    if float(counts.sum()) == 0:
        return dict(states[0])
    means = torch.stack([state["moments.mean"] for state in states])
    variances = torch.stack([state["moments.squared_deviations"] for state in states]) / counts.clamp_min(1.0)
    variance = variances.mean(0) + means.var(0, unbiased=False)
    kept = counts.mean(0).clamp(max=INHERITED_OBSERVATIONS)
    return {
        "moments.count": kept,
        "moments.mean": means.mean(0),
        "moments.squared_deviations": variance * kept,
    }
