"""The typed configuration of a training run, and how it is read from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from varshare_rl.algorithms.ppo import PPOConfig
from varshare_rl.algorithms.sac import SACConfig
from varshare_rl.envs.cartpole import CartPoleConfig
from varshare_rl.envs.gymnasium_suite import GymnasiumConfig
from varshare_rl.envs.lunarlander import LunarLanderConfig
from varshare_rl.envs.metaworld import MetaWorldConfig
from varshare_rl.envs.objects import ObjectsConfig
from varshare_rl.envs.pointmass import PointMassConfig
from varshare_rl.errors import UserError
from varshare_rl.nn import (
    CAREConfig,
    FiLMConfig,
    IndependentConfig,
    L2SoftConfig,
    LoRAConfig,
    MOOREConfig,
    MultiHeadConfig,
    PaCoConfig,
    SharedConfig,
    SoftModularizationConfig,
    TaskEmbeddingConfig,
    VarShareConfig,
    VarShareLoRAConfig,
)
from varshare_rl.nn.critic import CriticConfig
from varshare_rl.optim.aggregators import GradientConfig
from varshare_rl.optim.divergence_guard import DivergenceGuardConfig
from varshare_rl.optim.elbo import ElboConfig
from varshare_rl.optim.kl_schedules import BandConfig, ConstantConfig, DualConfig, FreeBitsConfig, RampConfig
from varshare_rl.optim.optimizer import OptimizerConfig
from varshare_rl.optim.priors import AdaptivePriorConfig, FixedPriorConfig, LearnedPriorConfig


class MatmulPrecision(Enum):
    """Of large matrix products on a CPU: float32, or factors rounded to bfloat16 and sums in float32."""

    highest = "highest"
    bf16 = "bf16"


class Device(Enum):
    """Where to compute; ``auto`` takes CUDA if there is any."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class EvaluationConfig:
    """``every`` so many transitions (all tasks; 0: only at the end), ``episodes`` of every task."""

    every: int = 200_000
    episodes: int = 5


@dataclass
class CheckpointConfig:
    """``every`` so many transitions (all tasks; 0: only at the end)."""

    every: int = 500_000


@dataclass
class LogConfig:
    """``every`` so many transitions (all tasks) a line of metrics; ``quiet``: nothing on screen."""

    every: int = 10_000
    quiet: bool = False


@dataclass
class ObserveConfig:
    """``every`` so many transitions (all tasks; 0: never) measure and show what the tasks share."""

    every: int = 200_000


@dataclass
class TrainConfig:
    """One training run. ``env``, ``algorithm`` and ``network`` hold the options of the chosen component."""

    env: Any = MISSING
    algorithm: Any = MISSING
    network: Any = MISSING
    elbo: ElboConfig = field(default_factory=ElboConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    divergence_guard: DivergenceGuardConfig = field(default_factory=DivergenceGuardConfig)
    total_transitions: int = 1_000_000  # all tasks together
    seed: int = 0
    device: Device = Device.auto
    run_dir: str | None = None  # default: runs/<suite>_<algorithm>_<network>_s<seed>_<time>
    resume: str | None = None  # a run folder to go on with
    matmul_precision: MatmulPrecision = MatmulPrecision.highest
    overlap: bool = False  # act for half of the environments while the workers step the other half
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)


#: The options of every component that can be chosen, by config group and name.
COMPONENTS: dict[str, dict[str, type]] = {
    "env": {
        "pointmass": PointMassConfig,
        "cartpole": CartPoleConfig,
        "lunarlander": LunarLanderConfig,
        "gymnasium": GymnasiumConfig,
        "metaworld": MetaWorldConfig,
        "objects": ObjectsConfig,
    },
    "algorithm": {"ppo": PPOConfig, "sac": SACConfig},
    "network": {
        "varshare_lora": VarShareLoRAConfig,
        "varshare": VarShareConfig,
        "shared": SharedConfig,
        "independent": IndependentConfig,
        "task_embedding": TaskEmbeddingConfig,
        "multi_head": MultiHeadConfig,
        "soft_modularization": SoftModularizationConfig,
        "paco": PaCoConfig,
        "moore": MOOREConfig,
        "care": CAREConfig,
        "film": FiLMConfig,
        "lora": LoRAConfig,
        "l2_soft": L2SoftConfig,
    },
    "elbo/schedule": {
        "constant": ConstantConfig,
        "ramp": RampConfig,
        "band": BandConfig,
        "dual": DualConfig,
        "free_bits": FreeBitsConfig,
    },
    "elbo/prior": {"fixed": FixedPriorConfig, "learned": LearnedPriorConfig, "adaptive": AdaptivePriorConfig},
}


def blank_config() -> TrainConfig:
    """The configuration with nothing chosen yet: what Hydra and :func:`load_config` put the choices into."""
    return TrainConfig(elbo=ElboConfig(schedule=MISSING, prior=MISSING))


def register_schemas() -> None:
    """Make the typed options known to Hydra, as ``<group>/<name>_schema``."""
    ConfigStore.instance().store(name="train_schema", node=blank_config())
    register_components(COMPONENTS)


def register_components(components: Mapping[str, Mapping[str, type]]) -> None:
    """Make the options of components known to Hydra, by group and name."""
    store = ConfigStore.instance()
    for group, options in components.items():
        for name, node in options.items():
            store.store(group=group, name=f"{name}_schema", node=node, package=group.replace("/", "."))


def load_config(path: Path) -> TrainConfig:
    """Read the ``config.yaml`` of the folder of a training run.

    Raises:
        UserError: as :func:`read_config`, or the folder is that of a sequence of tasks.
    """
    if is_sequence(path.parent):
        raise UserError(
            f"{path.parent} is a sequence of tasks, which `evaluate`, `export`, `report continual` and "
            "`continual resume=` take; here give the folder of a training run"
        )
    return cast(TrainConfig, read_config(path, blank_config(), COMPONENTS))


def is_sequence(run_dir: Path) -> bool:
    """Whether a folder is that of a sequence of tasks; no where there is no configuration that can be read."""
    try:
        return "method" in OmegaConf.load(run_dir / "config.yaml")
    except (OSError, YAMLError, OmegaConfBaseException, ValueError):
        return False


def read_config(path: Path, blank: Any, components: Mapping[str, Mapping[str, type]]) -> Any:
    """Read a file into a configuration with nothing chosen yet.

    Raises:
        UserError: the file is missing or is not a configuration of this version.
    """
    if not path.is_file():
        raise UserError(f"no config.yaml in {path.parent}; give the folder of a run (runs/<name>)")
    try:
        stored: Any = OmegaConf.load(path)
        config = OmegaConf.structured(blank)
        for group, options in components.items():
            key = group.replace("/", ".")
            chosen = options[OmegaConf.select(stored, f"{key}.name", throw_on_missing=True)]
            OmegaConf.update(config, key, OmegaConf.structured(chosen), merge=False)
        return OmegaConf.to_object(OmegaConf.merge(config, stored))
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a run configuration that this version can read: {reason}") from error
