"""Observing a run: what it writes, when, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from helpers import TINY, TINY_ALGORITHM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.nn import Posterior, VarShareLoRAConfig
from varshare_rl.run.sharing import Conflict, sharing_document
from varshare_rl.run.sharing_monitor import latest_observation, previews, scalars

NAMES = ("one", "two", "three")


def document(conflict: Conflict | None = None) -> dict[str, Any]:
    network = VarShareLoRAConfig(hidden=[6]).build(4, 2, 3, Posterior())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return sharing_document({"actor": network}, NAMES, 1000, conflict)


def test_the_document_survives_json_and_draws_no_random_number() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    network = VarShareLoRAConfig(hidden=[6]).build(4, 2, 3, Posterior())
    before = torch.get_rng_state(), before[1]
    made = sharing_document({"actor": network}, NAMES, 1000)
    previews(made)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    made = document()
    assert json.loads(json.dumps(made)) == made


def test_conflict_by_hand() -> None:
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-3.0, 0.0]], dtype=torch.float64)
    found = document(Conflict(7, {"actor": gradients @ gradients.t()}))["conflict"]
    assert found["transitions"] == 7
    half = 0.5**0.5
    assert found["networks"]["actor"]["negative_share"] == pytest.approx(2 / 3)
    assert found["networks"]["actor"]["mean_cosine"] == pytest.approx((half - 1.0 - half) / 3)


def test_scalars_of_a_document() -> None:
    gradients = torch.eye(3, dtype=torch.float64)
    made = document(Conflict(7, {"actor": gradients}))
    metrics = scalars(made)
    assert set(metrics) == {
        "sharing/all", "sharing/clusters",
        *(f"{kind}/actor.layers.{layer}" for kind in ("sharing", "effective_rank") for layer in (0, 1)),
        *(f"{kind}/{task}" for kind in ("residual", "sigma") for task in NAMES),
        "conflict/actor/negative_share", "conflict/actor/mean_cosine",
    }  # fmt: skip
    assert metrics["residual/two"] == made["residual"][1]
    assert metrics["effective_rank/actor.layers.1"] == pytest.approx(np.mean(made["layers"][1]["effective_rank"]))
    assert set(previews(made)) == {"sharing/distance", "sharing/similarity", "sharing/nats", "conflict/actor"}


def test_without_weights_per_task_only_conflict_is_left() -> None:
    made = sharing_document({"actor": nn.Linear(2, 2)}, NAMES, 5, Conflict(5, {"actor": torch.eye(3).double()}))
    assert set(scalars(made)) == {"conflict/actor/negative_share", "conflict/actor/mean_cosine"}
    assert set(previews(made)) == {"conflict/actor"}
    assert scalars(sharing_document({"actor": nn.Linear(2, 2)}, NAMES, 5)) == {}


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_run_is_observed_after_the_first_update_that_is_due(
    command: Command, folder: Path, algorithm: str
) -> None:
    overrides = (*TINY, *TINY_ALGORITHM[algorithm], "total_transitions=960", "run_dir=run", "observe.every=300")
    outcome = command("train", *overrides)
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    at = [line["transitions"] for line in lines if "sharing/all" in line]
    assert at == ([320, 640, 960] if algorithm == "ppo" else [304, 624, 912])
    files = sorted(Path("run/sharing").iterdir())
    assert [path.name for path in files] == [f"{count:012d}.json" for count in at]
    last = json.loads(files[-1].read_text())
    assert last["transitions"] == last["conflict"]["transitions"] == at[-1]
    assert set(last["conflict"]["networks"]) == {"actor", "critic"}
    events = EventAccumulator("run").Reload()
    tags = events.Tags()
    assert {"sharing/distance", "sharing/nats", "conflict/actor"} <= set(tags["images"])
    assert {f"posterior/actor.network.layers.0/{name}" for name in ("mu_A", "sigma_B")} <= set(tags["histograms"])
    (value, *_) = events.Histograms("posterior/actor.network.layers.0/mu_B")
    first = json.loads(files[0].read_text())["layers"][0]["histograms"]["mu_B"]
    assert value.histogram_value.num == sum(first["counts"]) == 8 * 8 * 8  # tasks, outputs, rank


def test_off(command: Command) -> None:
    overrides = (*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=640", "run_dir=run", "observe.every=0")
    assert command("train", *overrides).code == 0
    assert not Path("run/sharing").exists()
    assert "sharing/" not in Path("run/metrics.jsonl").read_text()


def test_the_latest_observation(tmp_path: Path) -> None:
    assert latest_observation(tmp_path, 100) is None
    (tmp_path / "sharing").mkdir()
    for count in (50, 100, 150):
        text = json.dumps({"format_version": 1, "transitions": count})
        (tmp_path / "sharing" / f"{count:012d}.json").write_text(text)
    found = latest_observation(tmp_path, 120)
    assert found is not None
    assert found["transitions"] == 100
    (tmp_path / "sharing" / f"{100:012d}.json").write_text('{"format_ver')
    with pytest.raises(UserError, match=r"damaged observation: cannot read .*000000000100.json"):
        latest_observation(tmp_path, 120)
    (tmp_path / "sharing" / f"{100:012d}.json").write_text('{"format_version": 9}')
    with pytest.raises(UserError, match="format version 9"):
        latest_observation(tmp_path, 120)
