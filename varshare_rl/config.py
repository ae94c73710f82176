"""The typed configuration of a training run, and how it is read from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from varshare_rl.errors import UserError
from varshare_rl.fields import bounded
from varshare_rl.nn.critic import CriticConfig
from varshare_rl.optim.divergence_guard import DivergenceGuardConfig
from varshare_rl.optim.elbo import ElboConfig
from varshare_rl.optim.gradient import GradientConfig, gradient_schema
from varshare_rl.optim.optimizer import OptimizerConfig
from varshare_rl.reading import STUMBLES, check_folder, read_yaml
from varshare_rl.registry import lookup, register, registered, require_plugins
from varshare_rl.run.loop_config import OnDivergence
from varshare_rl.run_files import CONFIG_FILE
from varshare_rl.types import Tree

#: Keys of stored configurations by their names of today.
FORMER_KEYS = {
    "elbo.particles": "elbo.weight_samples",
    "optimizer.mean_rate": "optimizer.mu_lr_scale",
    "optimizer.spread_rate": "optimizer.rho_lr_scale",
    "guard": "divergence_guard",
    "origin": "pretrained",
    "method.exact_origin": "method.exact_pretrained",
}

#: Options that stored configurations may be without, and what was the rule before there was a choice.
FORMER_DEFAULTS = {
    "elbo.prior_units": "absolute",
    "elbo.start": "narrow",
    "elbo.likelihood": "unit",
    "optimizer.own_gradients": "averaged",
    "optimizer.adapter_epsilon": None,
    "gradient.scale": "paper",
    "env.staggered_resets": False,  # of suites that have the option
}

#: What is chosen by a name; a word for one of them is a choice, and its options are below it.
GROUPS = frozenset(
    {
        "env",
        "algorithm",
        "network",
        "critic",
        "gradient",
        "elbo/schedule",
        "elbo/prior",
        "method",
        "experiment",
        "tuned",
        "tuned_method",
    }
)
#: ``resume=auto`` goes on with the folder of the same name, if there is one.
AUTO = "auto"

#: Options that may be changed when a run goes on.
RESUMABLE = ("total_transitions", "device", "on_divergence", "evaluate.", "checkpoint.", "log.", "observe.")
#: Options of a stored configuration that its checkpoint does not depend on.
CHANGEABLE = (
    *RESUMABLE,
    "run_dir",
    "resume",
    "overwrite",
    "plugins",
    "env.workers",
    "env.spaces",
    "algorithm.replay_folder",
)


_stored: dict[tuple[str, str], Any] = {}


class MatmulPrecision(Enum):
    """Large matrix products on a CPU: float32, or factors rounded to bfloat16 and sums in float32."""

    highest = "highest"
    bf16 = "bf16"


class Device(Enum):
    """Device to compute on; ``auto`` takes CUDA if there is any."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TableRows(Enum):
    """Tasks in the table of an evaluation: all, or of many the worst ten and the others in one line."""

    worst = "worst"
    all = "all"


@dataclass
class EvaluationConfig:
    """Options of ``evaluate``: evaluation in the course of training."""

    every: int = bounded(200_000, least=0)
    "Transitions between evaluations, the first one before training; 0: only at the end."
    episodes: int = bounded(5, least=1)
    "Episodes of every task."


@dataclass
class CheckpointConfig:
    """Options of ``checkpoint``."""

    every: int = bounded(500_000, least=0)
    "Transitions between checkpoints; 0: by time alone. There is one at the start and one at the end."
    minutes: float = bounded(2.0, least=0)
    """Minutes after which a checkpoint is due in any case, or twenty times as long as writing one takes, if that is
    more; 0: by transitions alone."""
    keep: int = bounded(2, least=1)
    "Checkpoints that stay, the newest ones: where the newest is damaged, the run goes on from the one before."
    wait_minutes: float = bounded(30.0, least=0, most=10_000)
    "Minutes that a full disk is waited for; then the run ends, with its last checkpoint to go on from."


@dataclass
class LogConfig:
    """Options of ``log``."""

    every: int = bounded(10_000, least=0)
    "Transitions between lines of metrics."
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    "Where metrics go besides `metrics.jsonl`: `tensorboard`, `csv`, `wandb`, `mlflow`."
    quiet: bool = False
    "Nothing on screen."
    tasks: TableRows = TableRows.worst
    "Tasks in the table of an evaluation; `worst`: of more than 12 the worst ten, and the others in one line."


@dataclass
class ObserveConfig:
    """Options of ``observe``."""

    every: int = bounded(200_000, least=0)
    "Transitions between observations of what the tasks share; 0: never."


@register("command", "train")
@dataclass
class TrainConfig:
    """One training run. Transitions without "per task" are those of all tasks together."""

    #: Groups of components that are chosen for it.
    groups: ClassVar[tuple[str, ...]] = ("env", "algorithm", "network", "elbo/schedule", "elbo/prior")
    #: Further names of options, which Python would not allow as names.
    aliases: ClassVar[dict[str, str]] = {"from": "pretrained"}
    #: Options that may differ between a checkpoint and the run that goes on with it.
    changeable: ClassVar[tuple[str, ...]] = CHANGEABLE

    env: Any = MISSING
    "The suite of tasks: `env=<name>`, with options of its own."
    algorithm: Any = MISSING
    "The algorithm: `algorithm=<name>`, with options of its own."
    network: Any = MISSING
    "The layers of the networks: `network=<name>`, with options of its own."
    elbo: ElboConfig = field(default_factory=ElboConfig)
    "The posteriors' divergence, priors and draws."
    critic: CriticConfig = field(default_factory=CriticConfig)
    "Critics: `critic=<name>` chooses settings together."
    gradient: GradientConfig = field(default_factory=lambda: gradient_schema()())
    "Aggregation of the losses per task to one gradient: `gradient=<name>`."
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    "Rates, decay and schedule of the optimisers."
    divergence_guard: DivergenceGuardConfig = field(default_factory=DivergenceGuardConfig)
    "Tasks that are left out of a step."
    on_divergence: OnDivergence = OnDivergence.mask
    """Where a task's loss or gradient is NaN or infinite: `mask` leaves the task out of the step, `stop` ends the
    run, `rollback` goes on from the last checkpoint with half the learning rate."""
    total_transitions: int = bounded(1_000_000, least=1)
    "Budget in transitions of all tasks together."
    seed: int = bounded(0, least=0, most=2**32 - 1)
    "Seed of everything random."
    device: Device = Device.auto
    "Device to compute on; `auto` takes CUDA if there is any."
    run_dir: str | None = None
    "The run folder; null: `runs/<suite>_<algorithm>_<network>_s<seed>_<time>`."
    pretrained: str | None = None
    """`from=` on the command line: a run folder whose last checkpoint this run begins with. Its options are that
    run's, and those of `algorithm`, `optimizer`, `gradient` and `elbo` may be given anew."""
    resume: str | None = None
    "A run folder to go on with; `auto`: the folder of this name if it holds a run, else a new one."
    overwrite: bool = False
    "Start anew in a folder that holds a run, whose files are removed."
    plugins: list[str] = field(default_factory=list)
    "Modules of yours that are imported first and register components."
    tasks_per_rank: int | None = bounded(None, least=1)
    "Tasks whose environments a process holds where torchrun starts several; null: some environments of every task."
    matmul_precision: MatmulPrecision = MatmulPrecision.highest
    "`bf16` rounds the factors of large products (SAC on a CPU)."
    overlap: bool = False
    "Act for half of the environments while the workers step the other half."
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
    "Evaluation in the course of training."
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    "Checkpoints."
    log: LogConfig = field(default_factory=LogConfig)
    "Metrics."
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    "Observations of the sharing among tasks."


AnyConfig = TypeVar("AnyConfig", bound=TrainConfig)


def blank_config(schema: type[AnyConfig]) -> AnyConfig:
    """A configuration with nothing chosen yet: what Hydra and :func:`read_config` put the choices into."""
    return schema(elbo=ElboConfig(schedule=MISSING, prior=MISSING))


def config_folder() -> Path:
    """Folder of the YAML files: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"the configs folder is missing beside {package}; install the package again")


def register_schemas(command: str) -> None:
    """Make the components of a command known to Hydra, as ``<group>/<name>`` and, to extend, ``<name>_schema``."""
    schema: type[TrainConfig] = lookup("command", command)
    store, parts = ConfigStore.instance(), (schema, gradient_schema())
    if _stored.get(("command", command)) != parts:  # plugins bring further ones
        store.store(name=f"{command}_schema", node=blank_config(schema))
        _stored["command", command] = parts
    for group in schema.groups:
        for name, node in registered(group).items():
            _store(group, name, node)
    _store("critic", "default", CriticConfig)
    for name in registered("gradient"):
        if ("gradient", name) not in _stored:
            store.store(group="gradient", name=name, node={"actor": name, "critic": name}, package="gradient")
            _stored["gradient", name] = name


def _store(group: str, name: str, node: Any) -> None:
    """Make a component known to Hydra, unless it is."""
    if _stored.get((group, name)) is node:
        return
    store, package = ConfigStore.instance(), group.replace("/", ".")
    store.store(group=group, name=f"{name}_schema", node=node, package=package)
    if not (config_folder() / group / f"{name}.yaml").is_file():  # which extends it under its name
        store.store(group=group, name=name, node=node, package=package)
    _stored[group, name] = node


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
    return read_config(path, TrainConfig)


def is_sequence(run_dir: Path) -> bool:
    """Return True for the folder of a sequence of tasks; False where no configuration can be read."""
    try:
        return "method" in read_yaml(run_dir / CONFIG_FILE)
    except UserError:
        return False


def read_config(path: Path, schema: type[AnyConfig]) -> AnyConfig:
    """Read a stored configuration, with keys as they are or were.

    Raises:
        UserError: the file is missing, is not a configuration of this version, or names modules that are not
            imported; or the folder has links out of it.
    """
    if not path.exists():
        raise UserError(f"no config.yaml in {path.parent}; give the folder of a run (runs/<name>)")
    check_folder(path.parent)
    stored: Any = read_yaml(path)
    with _readable(path):
        plugins = [str(name) for name in OmegaConf.select(stored, "plugins", default=[])]
    require_plugins(plugins, path.parent)
    with _readable(path):
        _rename(stored)
        _complete(stored)
        config = OmegaConf.structured(blank_config(schema))
        for group in schema.groups:
            key = group.replace("/", ".")
            chosen = lookup(group, OmegaConf.select(stored, f"{key}.name", throw_on_missing=True))
            OmegaConf.update(config, key, OmegaConf.structured(chosen), merge=False)
        made = cast(AnyConfig, OmegaConf.to_object(OmegaConf.merge(config, stored)))
    modules: Callable[[], list[str]] = getattr(made.env, "modules", list)
    require_plugins(modules(), path.parent)
    return made


def flat_options(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return all options by dotted name, as plain values; lists as text."""
    flat: dict[str, bool | int | float | str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                add(f"{prefix}.{name}" if prefix else str(name), entry)
        else:
            plain = getattr(value, "value", value)  # an enum by its value
            flat[prefix] = plain if isinstance(plain, bool | int | float) else str(plain)

    add("", asdict(config))
    return flat


def compared_options(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return the few options that runs are told apart by: the main choices, and what is not at its default."""
    parts = {part.name: type(getattr(config, part.name)) for part in fields(config)}
    plain: dict[str, Any] = {name: part() for name, part in parts.items() if is_dataclass(part)}
    plain["elbo"] = ElboConfig(schedule=type(config.elbo.schedule)(), prior=type(config.elbo.prior)())
    defaults = flat_options(replace(config, **plain))
    choices = {
        "env": getattr(config.env, "benchmark", None) or config.env.name,
        "algorithm": config.algorithm.name,
        "network": config.network.name,
        "elbo.kl_weight": config.elbo.kl_weight,
        "seed": config.seed,
        "total_transitions": config.total_transitions,
    }
    named = (".name", ".benchmark")
    return choices | {
        name: value
        for name, value in fixed_options(config).items()
        if value != defaults.get(name) and not name.endswith(named)
    }


def fixed_options(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return the options that may not change when a run goes on, as :func:`flat_options`."""
    return {name: value for name, value in flat_options(config).items() if not name.startswith(config.changeable)}


def check_unchanged(run_dir: Path, config: TrainConfig, state: Tree) -> None:
    """Raise UserError if ``config.yaml`` is not what a checkpoint's ``state`` was made with, in what matters to it.

    Checkpoints of former versions do not know.
    """
    now = fixed_options(config)
    for name, before in state.get("options", {}).items():
        if now.get(name, before) != before:
            raise UserError(
                f"{name} is {now[name]} in {run_dir / 'config.yaml'}, and its checkpoint was made with {before}; "
                "put that back, or start a new run"
            )


def check_same(run_dir: Path, config: TrainConfig, stored: TrainConfig) -> None:
    """Raise UserError unless the run in a folder is the one that ``config`` asks for, in what may not change."""
    before = fixed_options(stored)
    for name, now in fixed_options(config).items():
        if name in before and before[name] != now:
            raise UserError(
                f"{name} is {now}, and {run_dir} holds a run with {before[name]}; give another folder, or "
                "overwrite=true to start anew in this one"
            )


def made_otherwise(config: TrainConfig, stored: TrainConfig) -> str:
    """Say how a run that is done was evaluated and guarded, where that is not as asked; empty where it is."""
    before = flat_options(stored)
    differing = [
        f"{name}={before[name]}, not {now}"
        for name, now in flat_options(config).items()
        if name.startswith(("evaluate.", "on_divergence")) and before.get(name, now) != now
    ]
    return f"made with {'; '.join(differing)}; overwrite=true makes it anew" if differing else ""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except STUMBLES as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not a run configuration that this version can read: {reason}") from error


def _rename(stored: Any) -> None:
    """Give former keys their names of today."""
    for former, name in FORMER_KEYS.items():
        parent, _, key = former.rpartition(".")
        options = OmegaConf.select(stored, parent) if parent else stored
        if options is not None and key in options:
            options[name.rpartition(".")[2]] = options.pop(key)


def _complete(stored: Any) -> None:
    """Give options that came later the values that say what was done before."""
    for name, value in FORMER_DEFAULTS.items():
        parent, _, key = name.rpartition(".")
        options = OmegaConf.select(stored, parent)
        if options is None or key in options:
            continue
        suite = registered("env").get(options.get("name")) if parent == "env" else None
        if parent != "env" or (suite is not None and key in {option.name for option in fields(suite)}):
            options[key] = value
