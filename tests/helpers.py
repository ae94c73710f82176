"""Settings that several test modules share."""

from __future__ import annotations

#: Overrides that make a run on the toy suite take a fraction of a second.
TINY = (
    "env=pointmass",
    "env.envs_per_task=2",
    "network.hidden=[8]",
    "log.every=160",
    "evaluate.every=0",
    "evaluate.episodes=2",
    "checkpoint.every=0",
    "log.quiet=true",
    "device=cpu",
)
#: The same for an algorithm.
TINY_ALGORITHM = {
    "ppo": (
        "algorithm=ppo",
        "algorithm.rollout_transitions_per_task=40",
        "algorithm.epochs=2",
        "algorithm.minibatches=2",
    ),
    "sac": (
        "algorithm=sac",
        "algorithm.start_transitions_per_task=20",
        "algorithm.batch_per_task=8",
        "algorithm.replay_capacity_per_task=100",
        "algorithm.updates_per_vector_step=0.5",
    ),
}
