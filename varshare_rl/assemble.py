"""Assemble a run from its configuration."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import gymnasium
import torch
from torch import nn

from varshare_rl.algorithms.base import AgentContext, Algorithm, NetworkFactory, Regularizer, TaskSpec
from varshare_rl.config import (
    Device,
    MatmulPrecision,
    TableRows,
    TrainConfig,
    check_unchanged,
    fixed_options,
    load_config,
)
from varshare_rl.envs.object_env import Maker
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError
from varshare_rl.nn.config import Blocks, NetworkConfig
from varshare_rl.nn.initialization import initialize
from varshare_rl.nn.layer import posterior_layers
from varshare_rl.nn.mlp import ACTIVATIONS, BroNet
from varshare_rl.nn.parameters import ParameterCount, count_parameters, match_width, with_width
from varshare_rl.nn.variational import stochastic_layers
from varshare_rl.optim.elbo import Elbo
from varshare_rl.optim.kl_schedules import BandConfig
from varshare_rl.ranks import ALONE, Ranks, several
from varshare_rl.run.checkpoint import fitting, newest_checkpoint
from varshare_rl.run.console import Console
from varshare_rl.run.loop import Run
from varshare_rl.run.loop_config import LoopConfig
from varshare_rl.run.process import require_memory, seed_everything, threads_for
from varshare_rl.run.ranked_engine import make_engine
from varshare_rl.run.results import provenance
from varshare_rl.run.sharing_monitor import SharingMonitor
from varshare_rl.run.tracker import Tracker
from varshare_rl.run_files import CONFIG_FILE
from varshare_rl.types import Tree


def choose_device(device: Device) -> torch.device:
    """The device asked for; ``auto`` is CUDA if there is any. Raises UserError if it is not there."""
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise UserError("device=cuda was asked for, and torch sees no CUDA device; use device=cpu or auto")
    use_cuda = device is Device.cuda or (device is Device.auto and available)
    if use_cuda and several() and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} ranks on this machine need as many CUDA devices, and there are "
            f"{torch.cuda.device_count()}; give a smaller --nproc-per-node, or device=cpu"
        )
    return torch.device("cuda" if use_cuda else "cpu")


def prepare_process(seed: int, precision: MatmulPrecision) -> None:
    """Choose for the whole process the random numbers, and how a CPU computes large matrix products."""
    seed_everything(seed)
    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = "bf16" if precision is MatmulPrecision.bf16 else "ieee"


def build_suite(config: TrainConfig, makers: Mapping[str, Maker] | None = None) -> Suite:
    """Build the suite of ``config.env``; ``makers`` make its environments where these are Python objects.

    Raises:
        UserError: an impossible choice.
    """
    suite: Suite = config.env.build() if makers is None else config.env.build(makers)
    return suite


class NetworkSource(Regularizer, Protocol):
    """Gives an algorithm other networks than ``network`` would, and takes part in their training."""

    def network(self, part: str, in_features: int, out_features: int) -> nn.Module:
        """The next network of ``actor`` or ``critic``."""


def build_algorithm(
    config: TrainConfig,
    suite: Suite,
    device: torch.device,
    source: NetworkSource | None = None,
    ranks: Ranks = ALONE,
) -> Algorithm:
    """The algorithm with fresh networks, drawn from torch's global generator, or with those of a ``source``.

    ``ranks`` train it together.

    With ``network.active_parameters`` the widths that follow from it are written to ``network.hidden`` of
    ``config``, so that they are in whatever is made of it later, ``config.yaml`` first of all.
    """
    spec = build_task_spec(suite, config.env.envs_per_task, device)
    architecture = cast(NetworkConfig, config.network)
    for part, activation in (("network", architecture.activation), ("critic", config.critic.activation)):
        if activation is not None and activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise UserError(f"unknown {part}.activation {activation!r}; choose {allowed}")
    if architecture.active_parameters is not None:
        architecture.hidden = matched_hidden(config, architecture, spec)
    actor: NetworkFactory
    critic: NetworkFactory
    if source is None:
        actor = network_factory(config, architecture, spec.num_tasks)
        critic = network_factory(config, config.critic.architecture(architecture), spec.num_tasks)
    else:
        actor, critic = partial(source.network, "actor"), partial(source.network, "critic")
    context = AgentContext(
        spec, actor, build_elbo(config, spec.num_tasks), config.critic, critic,
        config.gradient, config.optimizer, config.divergence_guard, source, ranks,
    )  # fmt: skip
    algorithm: Algorithm = config.algorithm.build(context)
    if config.elbo.absorb.every and not any(any(posterior_layers(m)) for m in algorithm.trained_modules().values()):
        raise UserError(
            f"network={architecture.name} has no residuals for elbo.absorb.every={config.elbo.absorb.every} "
            "to absorb; use varshare_lora or varshare, or give 0"
        )
    modules = algorithm.trained_modules().values()
    if isinstance(config.elbo.schedule, BandConfig) and not any(any(stochastic_layers(m)) for m in modules):
        raise UserError(
            f"network={architecture.name} has no posterior, whose sigma elbo/schedule=band is about; "
            "use varshare_lora or varshare, or another elbo/schedule"
        )
    return algorithm


def network_factory(config: TrainConfig, architecture: NetworkConfig, num_tasks: int) -> NetworkFactory:
    """Makes networks of an architecture. The factory raises UserError for blocks that it does not have."""
    posterior = config.elbo.posterior()

    def make_network(in_features: int, out_features: int) -> nn.Module:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # to count, nothing is held
            planned = architecture.build(in_features, out_features, num_tasks, posterior)
        numbers = sum(parameter.numel() for parameter in planned.parameters())
        require_memory(
            TRAINED_BYTES * numbers,
            f"a network of {numbers:,} numbers for {num_tasks} tasks, with gradients and Adam's moments,",
            "give smaller network.hidden or network.rank",
        )
        network = architecture.build(in_features, out_features, num_tasks, posterior)
        initialize(network, architecture)
        if architecture.blocks is Blocks.bronet and not any(isinstance(x, BroNet) for x in network.modules()):
            raise UserError(
                f"network={architecture.name} puts its layers together in its own way, without blocks=bronet; "
                "choose blocks=mlp or another network"
            )
        return network

    return make_network


#: Bytes of a trained number: float32 itself, its gradient and Adam's two moments.
TRAINED_BYTES = 16


def build_elbo(config: TrainConfig, num_tasks: int) -> Elbo:
    """Build the ELBO of a run, which knows the budget of a task."""
    return Elbo(config.elbo, num_tasks, config.total_transitions / num_tasks)


def matched_hidden(config: TrainConfig, architecture: NetworkConfig, spec: TaskSpec) -> list[int]:
    """Sizes of the hidden layers that give the whole agent ``network.active_parameters`` per task.

    Which networks the algorithm trains is found by letting it build the narrowest ones, on the CPU and without
    moving the global random state. Raises UserError if no width gives that many.
    """
    narrowest = with_width(architecture, architecture.least_width())
    posterior = config.elbo.posterior()
    made: list[tuple[nn.Module, Callable[[NetworkConfig], nn.Module]]] = []  # and how to make it in another width

    def record(adapt: Callable[[NetworkConfig], NetworkConfig]) -> NetworkFactory:
        def make_network(in_features: int, out_features: int) -> nn.Module:
            def make(candidate: NetworkConfig) -> nn.Module:
                return adapt(candidate).build(in_features, out_features, spec.num_tasks, posterior)

            made.append((make(narrowest), make))
            return made[-1][0]

        return make_network

    with torch.random.fork_rng(devices=[]):
        context = AgentContext(
            replace(spec, device=torch.device("cpu")),
            record(lambda candidate: candidate),
            build_elbo(config, spec.num_tasks),
            config.critic,
            record(config.critic.architecture),
        )
        algorithm: Algorithm = config.algorithm.build(context)
    trained = {module for root in algorithm.trained_modules().values() for module in root.modules()}
    makers = [make for network, make in made if network in trained]
    return match_width(architecture, lambda candidate: [make(candidate) for make in makers], spec.num_tasks)


def build_task_spec(suite: Suite, envs_per_task: int, device: torch.device) -> TaskSpec:
    """Facts of the suite that the algorithm has to know."""
    actions, scale = suite.action_space, suite.observation_scale
    discrete = isinstance(actions, gymnasium.spaces.Discrete)
    return TaskSpec(
        num_tasks=len(suite.task_names),
        envs_per_task=envs_per_task,
        obs_size=math.prod(suite.observation_space.shape),
        action_size=int(actions.n) if isinstance(actions, gymnasium.spaces.Discrete) else actions.shape[0],
        discrete=discrete,
        action_mask=torch.from_numpy(suite.action_mask),
        device=device,
        horizon=suite.horizon,
        obs_scale=None if scale is None else (torch.from_numpy(scale[0]), torch.from_numpy(scale[1])),
    )


@dataclass(frozen=True)
class TrainedAgent:
    """Contents of a run folder: an agent, and what it was trained with."""

    config: TrainConfig
    suite: Suite
    algorithm: Algorithm
    device: torch.device
    checkpoint: Path
    state: Tree  # of the checkpoint: counters, and the algorithm's own


def load_agent(run_dir: Path, kind: str, device: Device, makers: Mapping[str, Maker] | None = None) -> TrainedAgent:
    """Load the policy in the newest checkpoint of a ``kind`` (last or best) of a run; see :func:`build_suite`.

    Raises:
        UserError: there is no such run or checkpoint, or this version cannot read it.
    """
    if kind not in ("last", "best"):
        raise UserError(f"unknown checkpoint {kind!r}; choose last or best")
    config = load_config(run_dir / CONFIG_FILE)
    checkpoint, state = newest_checkpoint(run_dir, kind)
    with fitting(run_dir):
        check_unchanged(run_dir, config, state)
    chosen = choose_device(device)
    prepare_process(config.seed, config.matmul_precision)
    suite = build_suite(config, makers)
    algorithm = build_algorithm(config, suite, chosen)
    with fitting(run_dir):
        algorithm.load_policy_state(state["algorithm"])
    return TrainedAgent(config, suite, algorithm, chosen, checkpoint, state)


def run_provenance(config: TrainConfig, suite: Suite, device: torch.device) -> dict[str, Any]:
    """The conditions of a result of this run, see :func:`varshare_rl.run.results.conditions`."""
    chosen = {"matmul_precision": config.matmul_precision.value, "overlap": config.overlap}
    return provenance({**suite.provenance, **chosen}, config.seed, device)


def parameter_count(algorithm: Algorithm, num_tasks: int) -> ParameterCount:
    """Parameters of everything the algorithm trains."""
    return count_parameters(algorithm.trained_modules().values(), num_tasks)


def build_run(
    config: TrainConfig,
    suite: Suite,
    run_dir: Path,
    resumed_at: int | None = None,
    seconds: float = 0.0,
    source: NetworkSource | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """All parts of a training run: seeds, networks, logs, engine. The engine starts to get ready at once.

    A run that goes on was ``resumed_at`` so many transitions, after so many ``seconds``. A ``source`` gives it
    other networks than ``config.network`` would. The first of several ``ranks`` alone writes and prints.
    """
    device = choose_device(config.device)
    prepare_process(config.seed, config.matmul_precision)
    algorithm = build_algorithm(config, suite, device, source, ranks)
    if device.type == "cpu":
        sizes = algorithm.memory_bytes()
        require_memory(
            sum(sizes.values()),
            f"training ({', '.join(f'{name} {size / 1e9:,.1f} GB' for name, size in sizes.items())})",
            "give smaller networks, batches, rollouts or replay, or fewer env.envs_per_task",
        )
    options = LoopConfig(
        total_transitions=config.total_transitions,
        evaluate_every=config.evaluate.every,
        evaluate_episodes=config.evaluate.episodes,
        checkpoint_every=config.checkpoint.every,
        checkpoint_minutes=config.checkpoint.minutes,
        checkpoint_keep=config.checkpoint.keep,
        checkpoint_wait_minutes=config.checkpoint.wait_minutes,
        on_divergence=config.on_divergence,
        log_every=config.log.every,
        observe_every=config.observe.every,
        overlap=config.overlap,
        tasks_per_rank=config.tasks_per_rank,
    )
    written = run_dir if ranks.first else None
    tracker = Tracker(written, resumed_at, seconds, config.log.trackers, suite.task_names)
    screen = None if ranks.first else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    conditions: dict[str, Any] = {"threads": threads_for(algorithm.largest_product())}
    conditions |= {"ranks": ranks.size} if ranks.size > 1 else {}
    conditions |= {} if config.pretrained is None else {"from": config.pretrained}
    return Run(
        suite=suite,
        provenance=run_provenance(config, suite, device) | conditions,
        engine=make_engine(suite, config.env.envs_per_task, config.seed, False, ranks, config.tasks_per_rank),
        algorithm=algorithm,
        tracker=tracker,
        sharing_monitor=SharingMonitor(run_dir, suite.task_names, tracker, resumed_at if ranks.first else None),
        console=Console(
            config.total_transitions, config.log.quiet or not ranks.first, screen, config.log.tasks is TableRows.all
        ),
        run_dir=run_dir,
        seed=config.seed,
        device=device,
        config=options,
        options=fixed_options(config),
        ranks=ranks,
    )
