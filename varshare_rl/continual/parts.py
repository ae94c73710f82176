"""What a sequence of tasks is made of: its places, its networks' shapes, and the agent that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, build_algorithm, build_suite, load_agent
from varshare_rl.config import TrainConfig
from varshare_rl.continual.config import ContinualConfig, one_task, with_task_list
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.nn.actor import Actor
from varshare_rl.nn.config import NetworkConfig
from varshare_rl.nn.shared import SharedLayer
from varshare_rl.reporting.continual_measures import original_name
from varshare_rl.transfer.likelihood import UnitGaussian, policy_likelihood
from varshare_rl.transfer.method import LayerFactory, Likelihood, NetworkSpec, Pretrained
from varshare_rl.transfer.networks import CriticCarry
from varshare_rl.transfer.pretrained import pretrained_from

#: Observations that count for the statistics of earlier tasks when a new one goes on from them.
INHERITED_OBSERVATIONS = 10_000


@dataclass(frozen=True)
class SequenceTask:
    """One task of a sequence.

    Attributes:
        name: unique in the sequence.
        suite, index: the suite that it is evaluated in, and which of its tasks it is.
        env: options of its environment alone; None for a task that was learnt before the sequence.
        alone: the suite of that.
    """

    name: str
    suite: Suite
    index: int
    env: Any = None
    alone: Suite | None = None


class NetworkProbe:
    """Takes down which networks an algorithm asks for, and gives it plain ones.

    Attributes:
        sizes: input and output size of each network, by part.
    """

    def __init__(self, config: TrainConfig) -> None:
        network: NetworkConfig = config.network
        self.architectures = {"actor": network, "critic": cast(Any, config.critic.architecture(config.network))}
        self.sizes: dict[str, list[tuple[int, int]]] = {"actor": [], "critic": []}

    def network(self, part: str, in_features: int, out_features: int) -> nn.Module:
        """A plain network."""
        self.sizes[part].append((in_features, out_features))
        return self._stack(part, in_features, out_features, SharedLayer)

    def penalty(self, part: str, transitions_per_task: int) -> float:
        """None."""
        return 0.0

    def advance(self, fraction: float) -> None:
        """Nothing moves."""

    def shapes(self, actor: Actor) -> dict[str, list[NetworkSpec]]:
        """The shapes of all networks, by part; ``actor`` is the policy that the algorithm has built."""
        likelihoods: dict[str, Likelihood] = {"actor": policy_likelihood(actor), "critic": UnitGaussian()}
        return {
            part: [self._shape(part, *size, likelihoods[part]) for size in sizes]
            for part, sizes in self.sizes.items()
        }

    def _shape(self, part: str, in_features: int, out_features: int, likelihood: Likelihood) -> NetworkSpec:
        def stack(layer: LayerFactory) -> nn.Module:
            return self._stack(part, in_features, out_features, layer)

        return NetworkSpec(in_features, out_features, stack, likelihood)

    def _stack(self, part: str, in_features: int, out_features: int, layer: LayerFactory) -> nn.Module:
        network: nn.Module = self.architectures[part].stack(in_features, out_features, layer)
        return network


def new_places(config: ContinualConfig) -> list[SequenceTask]:
    """The tasks that are learnt, in order, as many times as they come round.

    Raises:
        UserError: the environment is no list of tasks, or they differ in their spaces.
    """
    env = with_task_list(config.env, build_suite(config))
    whole = build_suite(replace(config, env=env))
    found = []
    for index, name in enumerate(whole.task_names):
        own = one_task(env, whole, index)
        alone = build_suite(replace(config, env=own))
        for space in ("observation_space", "action_space"):
            mine, common = getattr(alone, space), getattr(whole, space)
            if mine.shape != common.shape or getattr(mine, "n", None) != getattr(common, "n", None):
                raise UserError(
                    f"{space} of {name} is {mine}, of others {common}; tasks of a sequence must agree in it"
                )
        found.append(SequenceTask(name, whole, index, own, alone))
    return named_apart([], found * config.repeats)


def go_on_from(config: ContinualConfig, agent: TrainedAgent) -> ContinualConfig:
    """The configuration with networks as the agent has them, and observations as it sees them.

    Raises:
        UserError: the agent was trained by another algorithm.
    """
    if type(agent.config.algorithm) is not type(config.algorithm):
        raise UserError(
            f"from={config.pretrained} was trained with algorithm={agent.config.algorithm.name}, and "
            f"algorithm={config.algorithm.name} is chosen; choose the same"
        )
    theirs = agent.config.network
    names = ("hidden", "activation", "layer_norm", "blocks")
    network = replace(config.network, **{name: getattr(theirs, name) for name in names})
    # Parts of its policies that are in no network: what the base has learnt to see, and what its spread adds to.
    kept = ("normalize_observations", "initial_log_std")
    own = {name: getattr(agent.config.algorithm, name) for name in kept if hasattr(config.algorithm, name)}
    algorithm = replace(config.algorithm, **own)
    return replace(config, algorithm=algorithm, network=network, critic=agent.config.critic)


def load_pretrained(config: ContinualConfig, device: Any) -> TrainedAgent | None:
    """The agent of ``from=``, if one is given."""
    if config.pretrained is None:
        return None
    if not Path(config.pretrained).is_dir():
        raise UserError(f"no run folder {config.pretrained}, which from= goes on from; it is looked for from here")
    agent = load_agent(Path(config.pretrained), "last", device)
    if not isinstance(agent.algorithm, ActorCritic):
        raise UserError(
            f"from={config.pretrained} has no policy and critic to go on from; give a run of ppo or sac"
        )
    return agent


def all_pretrained(agent: TrainedAgent, carry: CriticCarry) -> dict[str, list[Pretrained]]:
    """What the networks of an agent leave for those of a sequence, by part: nothing of critics that start anew."""
    algorithm, count = cast(ActorCritic, agent.algorithm), len(agent.suite.task_names)
    found = {"actor": [pretrained_from(algorithm.actor.network, count)]}
    if carry is not CriticCarry.fresh:
        critic: Any = algorithm.critic
        networks = [critic.network] if hasattr(critic, "network") else list(critic.networks)
        found["critic"] = [pretrained_from(network, count) for network in networks]
    return found


def old_normalizers(agent: TrainedAgent) -> list[dict[str, Tensor]]:
    """The statistics of an agent's observations, one state for every task."""
    state = cast(ActorCritic, agent.algorithm).normalizer.state_dict()
    return [
        {name: value if value.dim() == 0 else value[task : task + 1].clone() for name, value in state.items()}
        for task in range(len(agent.suite.task_names))
    ]


def pooled_normalizer(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Statistics of the observations of several tasks together, which new ones soon outweigh.

    The variance is the mean variance plus the variance of the means.
    """
    count = states[0]["moments.count"]
    if float(count) == 0:
        return dict(states[0])
    means = torch.stack([state["moments.mean"] for state in states])
    variances = torch.stack([state["moments.squared_deviations"] for state in states]) / count
    variance = variances.mean(0) + means.var(0, unbiased=False)
    kept = count.clamp(max=INHERITED_OBSERVATIONS)
    return {
        "moments.count": kept,
        "moments.mean": means.mean(0),
        "moments.squared_deviations": variance * kept,
    }


def probe(config: TrainConfig, suite: Suite, device: torch.device) -> tuple[Actor, dict[str, list[NetworkSpec]]]:
    """A policy of the kind that the algorithm makes, and the shapes of all its networks."""
    blueprint = NetworkProbe(config)
    with torch.random.fork_rng(devices=[]):
        algorithm = build_algorithm(config, suite, device, blueprint)
    assert isinstance(algorithm, ActorCritic)
    return algorithm.actor, blueprint.shapes(algorithm.actor)


def check_spaces(config: ContinualConfig, agent: TrainedAgent, suite: Suite) -> None:
    """Refuse to go on from an agent of other spaces.

    Raises:
        UserError: names what differs.
    """
    for space, does in (("observation_space", "observes"), ("action_space", "does")):
        theirs, ours = (getattr(one, space) for one in (agent.suite, suite))
        if theirs.shape != ours.shape or getattr(theirs, "n", None) != getattr(ours, "n", None):
            raise UserError(
                f"from={config.pretrained} {does} other things than env={config.env.name} ({theirs} and {ours}); "
                "choose an env as there"
            )


def named_apart(old: Sequence[SequenceTask], new: Sequence[SequenceTask]) -> list[SequenceTask]:
    """The new places, where a task that was learnt before comes round again as ``<task> (2)``."""
    taken = {place.name for place in old}
    named = []
    for place in new:
        task, number = original_name(place.name), 1
        name = task
        while name in taken:
            number += 1
            name = f"{task} ({number})"
        taken.add(name)
        named.append(replace(place, name=name))
    return named


def old_places(agent: TrainedAgent | None) -> list[SequenceTask]:
    """The tasks of the agent that a sequence goes on from."""
    if agent is None:
        return []
    return [SequenceTask(name, agent.suite, index) for index, name in enumerate(agent.suite.task_names)]
