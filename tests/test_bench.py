"""The benchmark runs and writes what it should; nothing here looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bench.__main__ import main
from experiments.bench.contenders import Setting, measure
from experiments.bench.learners import filled_ppo, filled_sac
from experiments.bench.report import Goal, Ratio, Section, table
from varshare_rl.nn import SharedConfig


def test_a_choice_writes_ratios_medians_and_the_machine(tmp_path: Path) -> None:
    """Beside those of other choices, which stay."""
    (tmp_path / "results.json").write_text(json.dumps({"start": {"machine": {}, "rounds": 1, "sections": []}}))
    main(["layer", "--quick", "--rounds", "2", "--threads", "1", "--folder", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == ["start", "layer"]
    stored = written["layer"]
    assert stored["machine"]["threads"] == 1
    (section,) = stored["sections"]
    assert [row["name"] for row in section["medians"]] == ["VarShareLoRALayer", "loop over tasks", "nn.Linear"]
    assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in section["medians"])
    page = (tmp_path / "results.md").read_text()
    assert page.index("VarShareLoRALayer / loop over tasks") < page.index("| VarShareLoRALayer |")
    assert str(stored["machine"]["processor"]) in page


def test_ratios_are_of_the_same_round() -> None:
    section = Section("t", "ms", {"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 1.0]}, [Ratio("a", "b", Goal(2.5))])
    (row,) = section.as_dict()["ratios"]
    assert (row["median"], row["low"], row["high"], row["met"]) == (2.0, 2.0, 4.0, True)
    assert "| a / b | 2 (2 to 4) | <= 2.5: met |" in table(section.as_dict())
    assert not Goal(3.5, at_least=True).met(3.4)


def test_a_dead_contender_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"contender 'no such' of experiments\.bench\.layer died"):
        measure("experiments.bench.layer", ["no such"], 1, Setting(quick=True, threads=1))


def test_wrong_choices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["levitate"])
    assert stop.value.code == 2
    assert "unknown choice 'levitate'" in capsys.readouterr().err


def test_filled_learners_update() -> None:
    network = SharedConfig(hidden=[4])
    sac, ppo = filled_sac(network, 2, 4, 10), filled_ppo(network, 2, 4, 2)
    sac.update()
    ppo.update()
    assert (sac.updates, ppo.updates) == (1, 2)
    parameters = sum(p.numel() for module in sac.trained_modules().values() for p in module.parameters())
    critic = sum(p.numel() for p in sac.critic.parameters())
    rows = 2 * 10 * (39 + 4 + 1 + 1 + 39)
    assert sum(sac.memory_bytes().values()) == 4 * (4 * parameters + critic + rows)
