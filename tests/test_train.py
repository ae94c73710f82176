"""What a run leaves behind: its folder, its metrics under their names, TensorBoard, sweeps."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Outcome
from helpers import TINY, TINY_ALGORITHM

from varshare_rl.algorithms.ppo import PPO
from varshare_rl.algorithms.sac import SAC
from varshare_rl.config import load_config
from varshare_rl.nn import critic
from varshare_rl.nn.parameters import total_kl
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint

TASKS = (
    "normal_left", "normal_right", "swapped_left", "swapped_right", "flipped_down", "flipped_up",
    "heavy_down_left", "heavy_up_right",
)  # fmt: skip
RUN = ("log.every=160", "evaluate.every=320", "checkpoint.every=320", "total_transitions=960", "run_dir=run")


@pytest.fixture(params=["ppo", "sac"])
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(command_once: Callable[..., Path], algorithm: str) -> Path:
    return command_once("train", *TINY, *TINY_ALGORITHM[algorithm], *RUN)


def read(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_run_folder(run: Path, algorithm: str) -> None:
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    assert checkpoints[0].startswith("best-")
    assert checkpoints[1:] == ["last-000000000640", "last-000000000960"]
    config = load_config(run / "config.yaml")
    assert config.total_transitions == 960
    assert config.algorithm.name == algorithm
    assert config.network.hidden == [8]
    assert config.run_dir == "run"


def test_summary_has_the_fixed_keys(run: Path, algorithm: str) -> None:
    summary = read(run / "summary.json")
    assert summary.keys() >= {
        "mean_success", "mean_return", "tasks", "transitions", "updates", "seconds", "transitions_per_second",
        "parameters", "conditions",
    }  # fmt: skip
    assert tuple(summary["tasks"]) == TASKS
    for row in summary["tasks"].values():
        assert row.keys() >= {"success", "return", "kl"}
        assert 0 <= row["success"] <= 1
        assert math.isfinite(row["return"])
        assert row["kl"] > 0
    for name in ("success", "return"):
        values = [row[name] for row in summary["tasks"].values()]
        assert summary[f"mean_{name}"] == pytest.approx(sum(values) / len(values))
    assert summary["transitions"] == 960
    # PPO: 960 / 8 tasks / 40 = 3 rollouts of 2 epochs x 2 minibatches; SAC: every other step after 20 transitions
    assert summary["updates"] == {"ppo": 3 * 4, "sac": 25}[algorithm]
    assert summary["transitions_per_second"] == pytest.approx(960 / summary["seconds"], rel=1e-2)
    provenance = summary["conditions"]
    assert provenance.keys() >= {
        "python", "torch", "metaworld", "mujoco", "gymnasium", "suite", "horizon", "seed", "git_commit",
    }  # fmt: skip
    assert provenance["torch"] == torch.__version__
    assert (provenance["suite"], provenance["horizon"], provenance["seed"]) == ("pointmass", 40, 0)


def layer_sizes(*sizes: int) -> tuple[int, int]:
    """Parameters of the shared part, and numbers of one task's factors of rank 8, of an MLP."""
    pairs = list(pairwise(sizes))
    return sum(a * b + b for a, b in pairs), sum(8 * (a + b) for a, b in pairs)


def test_summary_counts_parameters(run: Path, algorithm: str) -> None:
    networks = [(4, 8, 4), (4, 8, 1)] if algorithm == "ppo" else [(4, 8, 4), (6, 8, 1), (6, 8, 1)]
    shared = sum(layer_sizes(*sizes)[0] for sizes in networks)
    means = sum(layer_sizes(*sizes)[1] for sizes in networks)
    assert read(run / "summary.json")["parameters"] == {
        "stored": shared + 8 * 2 * means,
        "active_per_task": shared + means,
        "shared": shared,
        "per_task": 2 * means,
    }


def expected_tags(algorithm: str) -> set[str]:
    tags = {f"kl/{task}" for task in TASKS}
    for task in (*(f"{name}/" for name in TASKS), "mean_"):
        tags |= {f"train/{task}return", f"train/{task}success", f"eval/{task}return", f"eval/{task}success"}
    losses = {
        "ppo": {"policy", "value", "entropy", "approximate_kl", "clip_fraction", "explained_variance"},
        "sac": {"actor", "critic", "entropy", "entropy_coefficient"},
    }
    of_tasks = {"ppo": {"entropy", "explained_variance"}, "sac": {"entropy_coefficient"}}
    tags |= {f"{name}/{task}" for name in of_tasks[algorithm] for task in TASKS}
    tags |= {f"loss/{name}" for name in losses[algorithm] | {"actor_grad_norm", "critic_grad_norm"}}
    return tags | {"time/transitions_per_second", "time/updates"}


def test_metrics_by_their_names(run: Path, algorithm: str) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert names >= expected_tags(algorithm) | {"transitions", "seconds"}
    counts = [line["transitions"] for line in lines]
    assert counts == sorted(counts)
    assert [line["transitions"] for line in lines if "time/updates" in line] == [160, 320, 480, 640, 800, 960]
    assert [line["transitions"] for line in lines if "eval/mean_success" in line] == [0, 320, 640, 960]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    last = [line for line in lines if "eval/mean_success" in line][-1]
    summary = read(run / "summary.json")
    assert last["eval/mean_return"] == pytest.approx(summary["mean_return"])
    for task, row in summary["tasks"].items():
        assert last[f"eval/{task}/return"] == pytest.approx(row["return"])
        assert last[f"kl/{task}"] == pytest.approx(row["kl"])


def test_kl_of_the_summary_is_that_of_all_networks(run: Path, algorithm: str) -> None:
    from varshare_rl.assemble import build_algorithm, build_suite

    config = load_config(run / "config.yaml")
    learner = build_algorithm(config, build_suite(config), torch.device("cpu"))
    assert isinstance(learner, PPO | SAC)
    learner.load_policy_state(load_checkpoint(find_checkpoint(run))["algorithm"])
    nats = total_kl(learner.actor, 8) + total_kl(learner.critic, 8)
    written = [row["kl"] for row in read(run / "summary.json")["tasks"].values()]
    assert written == pytest.approx(nats.tolist(), rel=1e-5)


def test_networks_without_posteriors_report_no_kl(command: Command) -> None:
    for network in ("shared", "independent"):
        outcome = command(
            "train",
            *TINY,
            *TINY_ALGORITHM["ppo"],
            f"network={network}",
            "total_transitions=160",
            f"run_dir={network}",
        )
        assert outcome.code == 0, outcome.err
        assert {row["kl"] for row in read(Path(network, "summary.json"))["tasks"].values()} == {None}
        assert "kl/" not in Path(network, "metrics.jsonl").read_text()


@pytest.fixture
def events(run: Path) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        yield EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_shows_what_the_metrics_hold(run: Path, events: Any, algorithm: str) -> None:
    tags = set(events.Tags()["scalars"])
    assert tags >= expected_tags(algorithm)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag in expected_tags(algorithm):
        shown = {event.step: event.value for event in events.Scalars(tag)}
        written = {line["transitions"]: line[tag] for line in lines if tag in line}
        assert shown == pytest.approx(written, rel=1e-6), tag
    plugins = events.summary_metadata
    assert any("hparams" in name for name in plugins)


def test_best_is_the_best_evaluation(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {  # the return decides where successes are equal
        line["transitions"]: (line["eval/mean_success"], line["eval/mean_return"])
        for line in lines
        if "eval/mean_success" in line
    }
    best = max(scores, key=lambda count: (scores[count], -count))
    assert find_checkpoint(run, "best").name == f"best-{best:012d}"


def test_nothing_quiet_is_shown_and_the_screen_names_the_results(command: Command) -> None:
    loud = [item for item in TINY if "quiet" not in item]
    outcome = command("train", *loud, *TINY_ALGORITHM["ppo"], "total_transitions=160", "run_dir=run")
    assert outcome.code == 0
    for part in ("pointmass", "ppo", "varshare_lora", "normal_left", "heavy_up_right", "run/summary.json"):
        assert part in outcome.out, outcome.out
    assert "under the draws it acted with" in outcome.out  # says when weights are drawn
    outcome = command("train", *TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160", "run_dir=other")
    assert outcome.out.strip() == "done: other/summary.json"


def test_a_run_without_a_name_gets_one_that_says_what_it_is(command: Command, folder: Path) -> None:
    outcome = command("train", *TINY, *TINY_ALGORITHM["sac"], "total_transitions=160", "seed=7")
    assert outcome.code == 0, outcome.err
    (made,) = (folder / "runs").iterdir()
    assert made.name.startswith("pointmass_sac_varshare_lora_s7_")
    assert [path.name for path in folder.iterdir()] == ["runs"]  # Hydra leaves nothing of its own


def test_a_sweep_makes_a_folder_for_each_run(command: Command, folder: Path) -> None:
    outcome: Outcome = command(
        "train", "-m", *TINY, *TINY_ALGORITHM["ppo"], "total_transitions=160", "elbo.kl_weight=0,0.5", "seed=0,1"
    )
    assert outcome.code == 0, outcome.err
    (sweep,) = (folder / "runs").iterdir()
    assert sweep.name.startswith("sweep_")
    runs = sorted(path.parent for path in sweep.rglob("summary.json"))
    assert len(runs) == 4
    configs = [load_config(path / "config.yaml") for path in runs]
    assert sorted((config.elbo.kl_weight, config.seed) for config in configs) == [
        (0, 0),
        (0, 1),
        (0.5, 0),
        (0.5, 1),
    ]
    for path, config in zip(runs, configs, strict=True):
        assert read(path / "summary.json")["conditions"]["seed"] == config.seed
        more = command("train", f"resume={path}", "total_transitions=320")  # the folder's name can be given
        assert more.code == 0, more.err


def test_device_auto_runs_somewhere(command: Command) -> None:
    settings = [item for item in TINY if not item.startswith("device")]
    outcome = command("train", *settings, *TINY_ALGORITHM["ppo"], "total_transitions=160", "run_dir=run")
    assert outcome.code == 0, outcome.err
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert read(Path("run/summary.json"))["conditions"]["device"].startswith(expected)


def test_the_matmul_precision_reaches_the_products(command: Command, tmp_path: Path) -> None:
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    try:
        for choice, expected in (("bf16", "bf16"), ("highest", "ieee")):
            chosen = (f"matmul_precision={choice}", f"run_dir={tmp_path / choice}")
            outcome = command("train", *TINY, *TINY_ALGORITHM["sac"], "total_transitions=16", *chosen)
            assert outcome.code == 0, outcome.err
            summary = json.loads((tmp_path / choice / "summary.json").read_text())
            assert summary["conditions"]["matmul_precision"] == choice
            assert backend.matmul.fp32_precision == expected
    finally:
        backend.matmul.fp32_precision = before


def test_nats_by_task_and_by_layer_add_up(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if any(name.startswith("kl_layer/") for name in line))
    by_task = [value for name, value in line.items() if name.startswith("kl/")]
    by_layer = [value for name, value in line.items() if name.startswith("kl_layer/")]
    assert len(by_task) == len(TASKS)
    assert len(by_layer) >= 4
    assert sum(by_layer) == pytest.approx(sum(by_task) / len(TASKS))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("elbo.estimator=flipout", "elbo.weight_samples=2"), "(flipout, 2 samples)"),
        (("elbo.draw.acting=per_episode",), "acting per_episode"),
        (("network=varshare",), "(local)"),
        ((), "(weight)"),
    ],
)
def test_the_first_screen_says_how_weights_are_drawn(
    command: Command, overrides: tuple[str, ...], words: str
) -> None:
    loud = [override for override in TINY if override != "log.quiet=true"]
    outcome = command("train", *loud, *TINY_ALGORITHM["ppo"], "total_transitions=16", *overrides)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "weight draws" in line]
    assert words in " ".join(outcome.out.split()), line


def test_the_first_screen_says_that_one_process_has_all_tasks(command: Command) -> None:
    loud = [override for override in TINY if override != "log.quiet=true"]
    words = (*loud, *TINY_ALGORITHM["ppo"], "total_transitions=40")
    assert "ranks " not in command("train", *words, "run_dir=plain").out
    assert "tasks_per_rank=4 is for several" in command("train", *words, "tasks_per_rank=4", "run_dir=one").out


def test_the_first_screen_leaves_out_what_the_network_does_not_have(command: Command) -> None:
    loud = [override for override in TINY if override != "log.quiet=true"]
    outcome = command("train", *loud, *TINY_ALGORITHM["ppo"], "total_transitions=16", "network=shared")
    assert outcome.code == 0, outcome.err
    assert "parameters" in outcome.out
    assert not [word for word in ("weight draws", "kl_weight") if word in outcome.out]


def test_matched_capacity_is_in_the_configuration_the_summary_and_later_runs(
    command: Command, algorithm: str
) -> None:
    arguments = ("network=l2_soft", "network.active_parameters=30000", "total_transitions=320", "run_dir=run")
    outcome = command("train", *TINY, *TINY_ALGORITHM[algorithm], *arguments)
    assert outcome.code == 0, outcome.err
    config = load_config(Path("run/config.yaml"))
    (width,) = config.network.hidden
    active = read(Path("run/summary.json"))["parameters"]["active_per_task"]
    assert width > 8  # of TINY
    assert abs(active - 30_000) <= 600
    assert command("train", "resume=run", "total_transitions=480").code == 0
    assert load_config(Path("run/config.yaml")).network.hidden == [width]
    outcome = command("evaluate", "run=run", "episodes=1", "device=cpu")
    assert outcome.code == 0, outcome.err


def test_penalised_layers_report_their_nats_without_being_drawn(command: Command) -> None:
    quiet = [item for item in TINY if item != "log.quiet=true"]
    arguments = ("network=l2_soft", "elbo.kl_weight=0.5", "total_transitions=320", "run_dir=run")
    outcome = command("train", *quiet, *TINY_ALGORITHM["ppo"], *arguments)
    assert outcome.code == 0, outcome.err
    assert "kl_weight" in outcome.out
    assert "weight draws" not in outcome.out
    tasks = read(Path("run/summary.json"))["tasks"]
    assert all(row["kl"] > 0 for row in tasks.values())
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    layers = {name for line in lines for name in line if name.startswith("kl_layer/")}
    assert layers == {
        f"kl_layer/{module}.network.layers.{index}" for module in ("actor", "critic") for index in (0, 1)
    }


def test_a_task_that_diverges_is_named_counted_and_left_out(
    command: Command, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    squared_error = "varshare_rl.nn.critic.squared_error"
    plain = critic.squared_error

    def broken(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        damaged = target.clone()
        damaged[2] = math.nan
        return plain(prediction, damaged)

    monkeypatch.setattr(squared_error, broken)
    outcome = command("train", *TINY, *TINY_ALGORITHM[algorithm], *RUN)
    assert outcome.code == 0, outcome.err
    (warning,) = [line for line in outcome.out.splitlines() if "diverged" in line]
    assert TASKS[2] in warning
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    counts = {name: value for line in lines for name, value in line.items() if name.startswith("divergence_guard/")}
    assert counts.keys() == {f"divergence_guard/{TASKS[2]}"}
    assert counts[f"divergence_guard/{TASKS[2]}"] > 1
    resumed = command("train", "resume=run", "total_transitions=1280")
    assert resumed.code == 0, resumed.err
    assert "diverged" not in resumed.out  # it has been said


def test_the_loop_tells_how_much_is_done(command: Command, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    kind: Any = {"ppo": PPO, "sac": SAC}[algorithm]
    monkeypatch.setattr(kind, "advance", lambda self, fraction: seen.append(fraction))
    assert command("train", *TINY, *TINY_ALGORITHM[algorithm], *RUN).code == 0
    assert seen == [(step + 1) * 16 / 960 for step in range(60)]
