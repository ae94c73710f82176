"""``python -m varshare_rl.train env=mt10``: train one agent on many tasks."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from varshare_rl.assemble import build_run, build_suite, parameter_count
from varshare_rl.cli import new_run_dir, run_command
from varshare_rl.config import TrainConfig, load_config
from varshare_rl.config_checks import check_config
from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically, write_json
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.run.evaluation import Evaluation
from varshare_rl.run.loop import Interrupted, Run
from varshare_rl.run.results import summary
from varshare_rl.types import Tree

#: What may be changed when a run goes on.
RESUMABLE = ("total_transitions", "device", "evaluate.", "checkpoint.", "log.", "observe.")


def main(composed: DictConfig) -> None:
    """Train as configured; called by Hydra, once per job of a sweep."""
    config = cast(TrainConfig, OmegaConf.to_object(composed))
    if config.resume is not None:
        resume(Path(config.resume))
        return
    check_config(config)
    suite = build_suite(config)
    parts = (suite.name, config.algorithm.name, config.network.name, f"s{config.seed}")
    run_dir = new_run_dir(config.run_dir, parts)
    run = build_run(config, suite, run_dir)
    train(config, run, None)


def resume(run_dir: Path) -> None:
    """Go on with the run in ``run_dir``; the command line may change what :data:`RESUMABLE` names."""
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir} to resume; give the folder of a run (runs/<name>)")
    overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("resume=")]
    refused = [item for item in overrides if not item.startswith(RESUMABLE)]
    if refused:
        allowed = ", ".join(name.rstrip(".") for name in RESUMABLE)
        raise UserError(f"{refused[0]} cannot be changed when a run is resumed; only {allowed} can")
    stored = OmegaConf.structured(load_config(run_dir / "config.yaml"))
    merged = OmegaConf.merge(stored, OmegaConf.from_dotlist(overrides))
    config = cast(TrainConfig, OmegaConf.to_object(merged))
    check_config(config)
    state = load_checkpoint(find_checkpoint(run_dir))
    if state["transitions"] >= config.total_transitions and (run_dir / "summary.json").exists():
        raise UserError(
            f"{run_dir} has done {state['transitions']} of {config.total_transitions} transitions already; "
            "give a larger total_transitions"
        )
    if "engine" not in state:
        raise UserError(f"{run_dir} holds a policy without its training state; resume the run it was made from")
    run = build_run(config, build_suite(config), run_dir, resumed_at=state["transitions"], seconds=state["seconds"])
    train(config, run, state)


def train(config: TrainConfig, run: Run, state: Tree | None) -> None:
    """Run the loop and write the results; on a signal, say how to go on and end."""
    describe(config, run)
    try:
        if state is None:
            run.start()
        else:
            run.load_state(state)
            (run.run_dir / "summary.json").unlink(missing_ok=True)  # of a smaller budget
        write_atomically(run.run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        evaluation = run.train()
        result = write_summary(config, run, evaluation)
        run.tracker.hparams(flat_options(config), final_metrics(result))
        run.console.message(f"done: {run.run_dir / 'summary.json'}")
    except Interrupted as stop:
        run.console.message(
            f"stopped by {stop} at {run.transitions:,} transitions, all saved; go on with:\n"
            f"    python -m varshare_rl.train {shlex.quote(f'resume={run.run_dir}')}"
        )
        raise SystemExit(stop.exit_code) from None
    finally:
        run.close()


def write_summary(config: TrainConfig, run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """Write ``summary.json`` and return what is in it."""
    result = summary(
        tasks=evaluation.tasks,
        transitions=run.transitions,
        updates=run.algorithm.updates,
        seconds=run.tracker.seconds,
        parameters=parameter_count(run.algorithm, len(run.suite.task_names)).as_dict(),
        provenance=run.provenance,
    )
    write_json(run.run_dir / "summary.json", result)
    return result


def describe(config: TrainConfig, run: Run) -> None:
    """Show what is about to be trained."""
    tasks = run.suite.task_names
    count = parameter_count(run.algorithm, len(tasks))
    shown = ", ".join(tasks[:10]) + (", ..." if len(tasks) > 10 else "")
    run.console.describe(
        f"{run.suite.name} · {config.algorithm.name} · {config.network.name}",
        {
            "run folder": str(run.run_dir),
            "tasks": f"{len(tasks)} ({shown}), {config.env.envs_per_task} environments each",
            "parameters": f"{count.stored:,} stored, {count.active_per_task:,} active per task, "
            f"{count.shared:,} shared, {count.per_task:,} per task",
            "memory": ", ".join(
                f"{name} {size / 1e6:.1f} MB" for name, size in run.algorithm.memory_bytes().items()
            ),
            "kl_weight": f"{config.elbo.kl_weight:g} (divided by {config.elbo.normalization.value}), "
            f"schedule {config.elbo.schedule.name}, prior {config.elbo.prior.name}",
            "weight draws": run.algorithm.weight_draws(),
            "gradient": f"actor {config.gradient.actor}, critic {config.gradient.critic}",
            "device": str(run.device),
            "transitions": f"{config.total_transitions:,} in total",
        },
    )


def flat_options(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """All options by dotted name, for TensorBoard's HParams tab."""
    flat: dict[str, bool | int | float | str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                add(f"{prefix}.{name}" if prefix else name, entry)
        else:
            plain = getattr(value, "value", value)  # an enum by its value
            flat[prefix] = plain if isinstance(plain, bool | int | float) else str(plain)

    add("", asdict(config))
    return flat


def final_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The final numbers that the HParams tab compares runs by."""
    chosen = {"eval/mean_success": "mean_success", "eval/mean_return": "mean_return"}
    return {tag: result[name] for tag, name in chosen.items() if result[name] is not None}


def command() -> None:
    """Run the command line."""
    run_command("train", main)
