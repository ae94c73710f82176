import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
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
    tracker.log({"eval/mean/success": 0.5}, 100)
    tracker.hparams(
        {"env": "mt10", "seed": 3, "elbo.kl_weight": 0.1, "normalise": True},
        {"eval/mean/success": 0.5, "eval/mean/return": 12.0},
    )
    tracker.close()

    assert [path for path in tmp_path.rglob("*") if path.is_dir()] == [tmp_path / "run"]  # no sub-run
    plugin = events_of(tmp_path / "run").PluginTagToContent(metadata.PLUGIN_NAME)
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
    assert names == ["eval/mean/success", "eval/mean/return"]
    assert metadata.SESSION_END_INFO_TAG in plugin
    # the tab takes the values from the curves of the same run: each is there once
    assert curve(tmp_path / "run", "eval/mean/success") == [(100, 0.5)]
    assert curve(tmp_path / "run", "eval/mean/return") == [(100, 12.0)]
