"""What is compared: networks, suites, and the settings of their runs."""

from __future__ import annotations

from typing import cast

from varshare_rl.cli import compose
from varshare_rl.config import TrainConfig

#: In the order of docs/architectures.md; the first is what times are relative to.
NETWORKS = (
    "shared", "task_embedding", "multi_head", "film", "soft_modularization", "care", "paco", "moore", "lora",
    "l2_soft", "varshare_lora", "varshare", "independent",
)  # fmt: skip
SUITES = {
    "pointmass": ("env=pointmass", "network.active_parameters=12400"),
    "metaworld": (
        "env=metaworld",
        "env.tasks=[reach-v3,drawer-close-v3,button-press-topdown-v3,window-open-v3]",
        "env.workers=1",
        "total_transitions=300000",
        "evaluate.every=0",
        "evaluate.episodes=50",
        "critic=popart",
        "critic.layer_norm=true",
        "algorithm.reward_scale=none",
        "network.active_parameters=60000",
    ),
}
#: CARE's encoders and context do not follow the width and alone are larger than these agents.
OWN = {
    ("pointmass", "care"): ("network.encoder_width=16", "network.context=16"),
    ("metaworld", "care"): ("network.encoder_width=32", "network.context=32"),
}


def settings(suite: str, network: str) -> list[str]:
    """The command line of a run, without its seed."""
    return [*SUITES[suite], f"network={network}", *OWN.get((suite, network), ())]


def configuration(suite: str, network: str, *more: str) -> TrainConfig:
    """What ``python -m varshare_rl.train`` makes of :func:`settings`, and of ``more`` in their place."""
    options = {item.partition("=")[0]: item for item in (*settings(suite, network), *more)}
    return cast(TrainConfig, compose("train", list(options.values())))
