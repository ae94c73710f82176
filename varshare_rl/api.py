"""The Python door: :func:`train`, :func:`load`, and the :class:`Agent` that both return.

Everything here calls what the commands call: the same options, run folders, numbers and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from varshare_rl.adapters.policy import TaskPolicy
from varshare_rl.algorithms.actor_critic import ActorCritic
from varshare_rl.assemble import TrainedAgent, load_agent
from varshare_rl.cli import compose
from varshare_rl.commands.evaluate import EvaluateConfig, Protocol, evaluate_agent
from varshare_rl.commands.export import Format, agent_policy, check_format, export, task_index
from varshare_rl.commands.report_sharing import agent_sharing
from varshare_rl.commands.train import run_config
from varshare_rl.config import AUTO, GROUPS, Device, TrainConfig, load_config
from varshare_rl.envs.object_env import Maker
from varshare_rl.envs.objects import ObjectsConfig
from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds
from varshare_rl.nn.weight_sampler import Resample
from varshare_rl.overrides import literal, override
from varshare_rl.reading import read_object
from varshare_rl.run.callbacks import Callbacks
from varshare_rl.run.evaluation import Evaluation, layer_kl
from varshare_rl.run.signals import Interrupted
from varshare_rl.run_files import CONFIG_FILE, SUMMARY_FILE
from varshare_rl.types import Metrics


def train(
    *arguments: str,
    envs: Mapping[str, Maker] | None = None,
    on_log: Callable[[int, Metrics], object] | None = None,
    on_evaluate: Callable[[int, Evaluation], object] | None = None,
    on_checkpoint: Callable[[int, Path], object] | None = None,
    **options: Any,
) -> Agent:
    """Train one agent on many tasks, as ``python -m varshare_rl.train`` does, and return it.

    ``train("mt10", "elbo.kl_weight=0.1", algorithm="sac", network={"hidden": [400, 400]})``

    Args:
        arguments: the name of an environment first, if any, and overrides as on the command line.
        envs: environments of your own in place of a name: by task, what makes a new ``gymnasium.Env``.
        on_log: called with the transitions so far and the metrics by name, every ``log.every`` transitions.
        on_evaluate: called with the transitions and the ``Evaluation``, whose ``tasks`` are means over episodes and
            whose ``mean("success")`` is that over tasks.
        on_checkpoint: called with the transitions and the folder of the checkpoint.
            Where ``on_log`` or ``on_evaluate`` returns ``False``, training ends, with all its results.
        options: overrides by keyword, a mapping for those below. A component is chosen by its name, or by
            ``name`` in a mapping with its options: ``elbo={"schedule": {"name": "ramp", "late": 0.1}}``.

    Raises:
        UserError: the line that the command would print.
        KeyboardInterrupt: training was interrupted; all is saved, and ``resume=<folder>`` goes on.
    """
    overrides = [*arguments, *to_overrides(options)]
    if arguments and "=" not in arguments[0]:
        overrides[0] = f"env={arguments[0]}"
    branches = any(item.startswith("from=") for item in overrides)  # whose environments are those of another run
    if envs is not None and not branches and options.get("resume") in (None, AUTO):
        named = [item for item in overrides if item.startswith("env=")]
        if named:
            raise UserError(f"{named[0]} and envs are both given; give the name of environments, or your own")
        overrides.insert(0, f"env={ObjectsConfig.name}")
    config = compose("train", overrides)
    try:
        run_dir = run_config(config, overrides, envs, Callbacks(on_log, on_evaluate, on_checkpoint))
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
    return load(run_dir, envs=envs, device=config.device)


def load(
    run_dir: str | PathLike[str],
    *,
    envs: Mapping[str, Maker] | None = None,
    checkpoint: str = "last",
    device: str | Device = Device.auto,
) -> Agent:
    """Load the agent of a run folder; like a run, this seeds the process and chooses its precision.

    Args:
        run_dir: of a training run.
        envs: its environments by task where they are Python objects; predictions do without them.
        checkpoint: ``last`` or ``best``.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: there is no such run or checkpoint, or this version cannot read it.
    """
    folder = Path(run_dir)
    chosen = choice(Device, "device", device)
    if envs is not None and load_config(folder / CONFIG_FILE).env.name != ObjectsConfig.name:
        raise UserError(f"{folder} was trained in environments that have a name; leave envs out")
    return Agent(load_agent(folder, checkpoint, chosen, envs), folder)


class Agent:
    """A trained agent: acts, is evaluated and exported, and says what its tasks share."""

    def __init__(self, trained: TrainedAgent, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._trained = trained
        self._suite = trained.suite

    def __repr__(self) -> str:
        config = self.config
        name = f"{self._suite.name} {config.algorithm.name} {config.network.name}"
        return f"<Agent {name}, {len(self.tasks)} tasks, {self.run_dir}>"

    @property
    def config(self) -> TrainConfig:
        """The whole configuration of the run."""
        return self._trained.config

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(self._suite.task_names)

    @property
    def results(self) -> dict[str, Any]:
        """The content of ``summary.json``. Raises UserError where the run has not ended."""
        path = self.run_dir / SUMMARY_FILE
        if not path.is_file():
            raise UserError(
                f"{self.run_dir} has no summary.json yet; go on with {override('resume', self.run_dir)}"
            )
        return read_object(path)

    def predict(self, obs: Any, task: str, deterministic: bool = True) -> Any:
        """Choose actions for a task from its own observations, on the posterior mean of the weights.

        Args:
            obs: as the task's environment gives them, one ``[F]`` or a batch ``[N, F]``.
            task: its name.
            deterministic: take the most likely action, instead of drawing one.

        Returns:
            Actions as the environment takes them: ``[A]`` within its bounds, or an int; of a batch ``[N, A]`` or
            ``[N]``.
        """
        index = task_index(task, self.tasks)
        algorithm = self._actor_critic()
        spaces = self._suite.native_spaces(index)
        return TaskPolicy(algorithm.actor, index, spaces, algorithm.normalizer).act(obs, deterministic)

    def evaluate(
        self,
        episodes: int | None = None,
        seed: int | None = None,
        protocol: str | None = None,
        draw: str | None = None,
        deterministic: bool = True,
    ) -> dict[str, Any]:
        """Play episodes of every task; returns what is written as ``evaluation.json``: means by task in ``tasks``.

        Args:
            episodes: of every task; None: those of ``protocol``, or 50.
            seed: of the episodes' starts; None: the run's own.
            protocol: ``goals``, ``official`` or ``quick``.
            draw: how weights are drawn: ``mean``, ``per_episode`` or ``per_step``; None: as the run says.
            deterministic: take the most likely actions, instead of drawing them with the noise of training.

        Raises:
            UserError: an impossible choice, or the environments are objects and were not given.
        """
        options = EvaluateConfig(
            str(self.run_dir),
            None if protocol is None else choice(Protocol, "protocol", protocol),
            episodes,
            deterministic=deterministic,
            draw=None if draw is None else choice(Resample, "draw", draw),
            seed=seed,
        )
        check_bounds(options)
        return evaluate_agent(self._trained, options)[0]

    def export(self, task: str, path: str | PathLike[str], format: str | None = None) -> Path:
        """Write the policy of a task into a new folder, or a file that ends with ``.pt2`` or ``.onnx``.

        Args:
            task: its name.
            path: the folder, or the file.
            format: ``torch``, ``onnx`` or ``peft``; None: ``onnx`` for such a file, otherwise ``torch``.

        Raises:
            UserError: the policy has no such form, or there is something at the path.
        """
        out = Path(path)
        guessed = Format.onnx if out.suffix == ".onnx" else Format.torch
        chosen = guessed if format is None else choice(Format, "format", format)
        check_format(chosen)
        export(agent_policy(self._trained, task, chosen), task, chosen, out)
        return out

    def kl(self) -> dict[str, float]:
        """Return the divergence of every task's posterior from its prior over all networks, in nats.

        Raises:
            UserError: the network has no posterior and no other penalty.
        """
        layers = layer_kl(self._trained.algorithm.trained_modules())
        if not layers:
            raise UserError(
                f"network={self.config.network.name} has no posterior, and so no nats; use varshare_lora"
            )
        return {task: float(sum(nats[i] for nats in layers.values())) for i, task in enumerate(self.tasks)}

    def sharing(self) -> dict[str, Any]:
        """Measure what the tasks share; returns what ``report sharing`` writes as ``sharing.json``.

        Raises:
            UserError: the network's weights are the same for all tasks.
        """
        return agent_sharing(self._trained, self.run_dir)

    def _actor_critic(self) -> ActorCritic:
        algorithm = self._trained.algorithm
        if not isinstance(algorithm, ActorCritic):
            raise UserError(f"algorithm={self.config.algorithm.name} has no policy that can be asked for actions")
        return algorithm


def to_overrides(options: Mapping[str, Any], above: str = "") -> list[str]:
    """Return keyword options as overrides of the command line."""
    overrides = []
    for name, value in options.items():
        key = f"{above}{name}"
        group = key.replace(".", "/")
        if group in GROUPS:
            chosen = value.get("name") if isinstance(value, Mapping) else value
            if chosen is not None or not isinstance(value, Mapping):
                overrides.append(f"{'+' * (group == 'experiment')}{group}={'null' if chosen is None else chosen}")
            value = {k: v for k, v in value.items() if k != "name"} if isinstance(value, Mapping) else {}
        overrides += to_overrides(value, f"{key}.") if isinstance(value, Mapping) else [f"{key}={literal(value)}"]
    return overrides


def choice(kind: type[Any], name: str, value: Any) -> Any:
    """Return the member of an enum that a value names. Raises UserError where there is none."""
    try:
        return kind(value)
    except ValueError as error:
        raise UserError(f"{name} is {value!r}; choose {', '.join(str(member.value) for member in kind)}") from error
