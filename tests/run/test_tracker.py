import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.util import tensor_util

from varshare_rl.errors import UserError
from varshare_rl.run.tracker import Tracker


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events_of(run_dir: Path) -> EventAccumulator:
    """Read the events as TensorBoard's own Python back end does."""
    return EventAccumulator(str(run_dir), size_guidance={"tensors": 0}).Reload()


def curve(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = events_of(run_dir).Tensors(tag)
    return [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in events]


def test_both_files_hold_what_was_logged(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    tracker.log({"train/reach-v3/return": 1.5, "loss": math.nan}, 100)
    tracker.log({"train/reach-v3/return": 2.5}, 200)
    entries = lines_of(tmp_path / "run")  # on disk before the run is closed
    tracker.close()
    tracker.close()
    assert [entry.pop("seconds") >= 0 for entry in entries] == [True, True]
    assert entries == [
        {"transitions": 100, "train/reach-v3/return": 1.5, "loss": None},
        {"transitions": 200, "train/reach-v3/return": 2.5},
    ]
    assert curve(tmp_path / "run", "train/reach-v3/return") == [(100, 1.5), (200, 2.5)]


def test_resume_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for transitions in range(100, 1100, 100):
        tracker.log({"train/mean/return": 1.0, "eval/mean/success": 0.5}, transitions)
    tracker.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"transitions": 1100, "seco')  # died while it wrote

    tracker = Tracker(tmp_path, resumed_at=400)
    assert [entry["transitions"] for entry in lines_of(tmp_path)] == [100, 200, 300, 400]
    tracker.log({"train/mean/return": 2.0}, 450)
    tracker.log({"eval/mean/success": 0.75}, 1500)  # later than all that it takes back
    tracker.close()

    assert [entry["transitions"] for entry in lines_of(tmp_path)] == [100, 200, 300, 400, 450, 1500]
    kept = [(step, 1.0) for step in (100, 200, 300, 400)]
    assert curve(tmp_path, "train/mean/return") == [*kept, (450, 2.0)]
    assert curve(tmp_path, "eval/mean/success") == [*((step, 0.5) for step, _ in kept), (1500, 0.75)]


def test_resume_twice(tmp_path: Path) -> None:
    for session, resumed_at in enumerate((None, 200, 100)):
        time.sleep(1.01)  # TensorBoard reads its files in the order of the seconds in their names
        tracker = Tracker(tmp_path, resumed_at=resumed_at)
        for transitions in ((resumed_at or 0) + 100, (resumed_at or 0) + 200):
            tracker.log({"x": float(session)}, transitions)
        tracker.close()
    assert curve(tmp_path, "x") == [(100, 0.0), (200, 2.0), (300, 2.0)]
    assert [(entry["transitions"], entry["x"]) for entry in lines_of(tmp_path)] == curve(tmp_path, "x")


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    first = [{"transitions": 10, "seconds": 90.5}, {"transitions": 20, "seconds": 201.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in first))
    tracker = Tracker(tmp_path, resumed_at=10, seconds=100.5)  # the checkpoint came after the last line
    assert 100.5 <= tracker.seconds < 110
    tracker.log({"x": 1.0}, 15)
    tracker.close()
    assert 100.5 <= lines_of(tmp_path)[-1]["seconds"] < 110


def test_resume_without_metrics_starts_at_zero(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, resumed_at=10)
    assert tracker.seconds < 10
    tracker.close()
    assert lines_of(tmp_path) == []


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    content = '{"transitions": 1, "seconds": 1}\nnonsense\n{"transitions": 3, "seconds": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics.jsonl': line 2 .*remove that line"):
        Tracker(tmp_path, resumed_at=5)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log({"loss/policy": 0.5}, 10)
    tracker.close()
    with pytest.raises(UserError, match=r"already holds a run: choose another run_dir, or '?resume="):
        Tracker(tmp_path)


def test_hparams_belong_to_the_run_itself(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    options = {"env": "mt10", "seed": 3, "elbo.kl_weight": 0.1, "normalise": True}
    tracker.begin(options, ["eval/mean_success", "eval/mean_return"])
    tracker.log({"eval/mean_success": 0.5, "eval/mean_return": 12.0}, 100)

    assert [path for path in tmp_path.rglob("*") if path.is_dir()] == [tmp_path / "run"]  # no sub-run
    plugin = events_of(tmp_path / "run").PluginTagToContent(metadata.PLUGIN_NAME)  # of a run that is stopped, too
    assert metadata.SESSION_END_INFO_TAG not in plugin
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    assert {name: value.WhichOneof("kind") for name, value in start.hparams.items()} == {
        "env": "string_value",
        "seed": "number_value",
        "elbo.kl_weight": "number_value",
        "normalise": "string_value",
    }
    assert start.hparams["elbo.kl_weight"].number_value == 0.1
    assert start.hparams["normalise"].string_value == "true"
    experiment = metadata.parse_experiment_plugin_data(plugin[metadata.EXPERIMENT_TAG])
    names = [info.name.tag for info in experiment.metric_infos]
    assert names == ["eval/mean_success", "eval/mean_return"]
    tracker.end()
    tracker.close()
    # the tab takes the values from the curves of the same run: each is there once
    assert curve(tmp_path / "run", "eval/mean_success") == [(100, 0.5)]
    assert metadata.SESSION_END_INFO_TAG in events_of(tmp_path / "run").PluginTagToContent(metadata.PLUGIN_NAME)


def test_mean_success_is_the_first_card_and_tasks_keep_their_order(tmp_path: Path) -> None:
    tasks = ("reach-v3", "assembly-v3")
    tracker = Tracker(tmp_path, task_names=tasks)
    tracker.begin({"seed": 1}, ["eval/mean_success"])
    row = {f"{phase}/{of}": 0.25 for phase in ("eval", "train") for of in ("mean_success", "reach-v3/success")}
    tracker.log({"absorb/error": 1.0, "loss/policy": 1.0} | row, 10)
    tracker.close()
    events = events_of(tmp_path)
    first, *_ = sorted(events.Tags()["tensors"])  # as TensorBoard sorts its cards
    assert curve(tmp_path, first) == curve(tmp_path, "eval/mean_success") == [(10, 0.25)]
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    categories = [found.title for found in Layout.FromString(content).category]
    assert categories == ["mean over tasks", "1 reach-v3", "2 assembly-v3"]


def test_a_table_of_all_scalars(tmp_path: Path) -> None:
    for resumed_at in (None, 100):
        tracker = Tracker(tmp_path, resumed_at, trackers=["csv"])
        for transitions in (100, 200) if resumed_at is None else (200, 300):
            tracker.log({"a": transitions / 8 + (resumed_at or 0), "task, one": math.inf}, transitions)
        tracker.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["transitions"]), row["name"], float(row["value"])) for row in rows] == [
        (100, "a", 12.5), (100, "task, one", math.inf),
        (200, "a", 125.0), (200, "task, one", math.inf), (300, "a", 137.5), (300, "task, one", math.inf),
    ]  # fmt: skip
    assert not list(tmp_path.glob("events*"))


def test_an_unknown_tracker_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tracker 'paper'; choose csv, mlflow, tensorboard, wandb"):
        Tracker(tmp_path / "run", trackers=["paper"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"log.trackers needs {name}, of the extra {name};"):
        Tracker(tmp_path, trackers=[name])


def log_twice(run_dir: Path, name: str) -> None:
    """Log 0.5 at 100, and 0.75 at 200 after a resume."""
    for resumed_at, value in ((None, 0.5), (100, 0.75)):
        tracker = Tracker(run_dir, resumed_at, trackers=[name], task_names=("a",))
        tracker.begin({"seed": 3, "env.name": "pointmass"}, ["eval/mean_success"])
        tracker.log(
            {"eval/mean_success": value, "kl/normal_left (2)": 1.5, "loss": math.nan}, (resumed_at or 0) + 100
        )
        tracker.images({"sharing/nats": np.zeros((3, 4, 3), np.uint8)}, (resumed_at or 0) + 100)
        histogram = {"counts": [1, 2], "low": 0.0, "high": 1.0, "total": 2.0, "squares": 1.0}
        tracker.histograms({"mu": histogram}, (resumed_at or 0) + 100)
        if resumed_at is not None:
            tracker.end()
        tracker.close()
        tracker.close()


@pytest.mark.slow
def test_mlflow_has_one_run_with_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    log_twice(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = (found for found in client.search_experiments() if found.name == "varshare_rl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"seed": "3", "env.name": "pointmass"}
    history = client.get_metric_history(run.info.run_id, "eval/mean_success")
    assert [(point.step, point.value) for point in history] == [(100, 0.5), (200, 0.75)]
    assert run.data.metrics["kl/normal_left _2_"] == 1.5


@pytest.mark.slow
def test_wandb_has_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    pytest.importorskip("wandb")
    log_twice(tmp_path / "run", "wandb")
    name = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    wanted = {b"eval/mean_success", b"transitions", b"pointmass", b"0.75", b"sharing/nats"}
    deadline = time.monotonic() + 30  # W&B's own process writes the end when it ends
    while True:
        files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        content = b"".join(file.read_bytes() for file in files)
        if all(part in content for part in wanted) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert {part for part in wanted if part not in content} == set()
