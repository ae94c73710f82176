"""``python -m varshare_rl.report compare``: what belongs together, what differs, and what is in the way."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import Command
from helpers import write_run
from test_errors import assert_one_line

from varshare_rl.commands.report_compare import read_runs
from varshare_rl.config import TrainConfig, load_config
from varshare_rl.fields import option_sentence
from varshare_rl.reporting.comparison import Section, compare_runs, group_labels
from varshare_rl.reporting.comparison_tables import group_rows
from varshare_rl.reporting.run_records import runs_named


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes most of a report's time."""
    monkeypatch.setattr("varshare_rl.reporting.comparison_figures.comparison_figures", lambda section, looks: {})


def sections(*folders: str, at: int | None = None, measure: str | None = None) -> list[Section]:
    runs, configs, left_out = read_runs(runs_named(folders or ["runs"]))
    assert left_out == []
    return compare_runs(runs, lambda name: option_sentence(configs[0], name), at, measure)


def rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


# groups


def test_seeds_are_pooled_and_groups_have_the_fewest_words_that_tell_them_apart(folder: Path) -> None:
    for seed in range(2):
        write_run(f"runs/a{seed}", "network=varshare_lora", "elbo.kl_weight=0.1", seed=seed)
        write_run(f"runs/b{seed}", "network=varshare_lora", "elbo.kl_weight=1", seed=seed)
        write_run(f"runs/c{seed}", "network=shared", "log.every=7", f"run_dir=elsewhere{seed}", seed=seed)
    (section,) = sections()
    assert {group.label: [run.seed for run in group.runs] for group in section.groups} == {
        "network=varshare_lora elbo.kl_weight=0.1": [0, 1],
        "network=varshare_lora elbo.kl_weight=1": [0, 1],
        "network=shared elbo.kl_weight=0.1": [0, 1],
    }
    assert [group.label for group in sections("runs/a0", "runs/c0")[0].groups] == ["varshare_lora", "shared"]


def test_labels_leave_out_what_another_option_says_already() -> None:
    one = {"network.name": "lora", "network.rank": 4, "seed": 1, "algorithm.discount": 0.9}
    other = {"network.name": "shared", "algorithm.discount": 0.99}
    assert group_labels([one, other]) == ["lora", "shared"]
    assert group_labels([one, {**one, "network.rank": 8}]) == ["network.rank=4", "network.rank=8"]
    assert group_labels([one]) == ["lora"]


def test_differences_are_sentences_with_what_the_option_means(folder: Path) -> None:
    write_run("runs/a", "network=varshare_lora", "elbo.kl_weight=0.1")
    write_run("runs/b", "network=shared", "elbo.kl_weight=0.1")
    write_run("runs/c", "network=shared", "elbo.kl_weight=2")
    (section,) = sections()
    said = {line.partition(" ")[0]: line for line in section.differences}
    assert said["network"] == (
        "network (the layers of the networks: network=<name>, with options of its own) is varshare_lora in "
        "network=varshare_lora elbo.kl_weight=0.1, shared in network=shared elbo.kl_weight=0.1 and network=shared "
        "elbo.kl_weight=2."
    )
    assert (
        "is 0.1 in network=varshare_lora elbo.kl_weight=0.1 and network=shared elbo.kl_weight=0.1, 2 in"
        in (said["elbo.kl_weight"])
    )
    assert said["network.rank"].endswith(
        "no option of network=shared elbo.kl_weight=0.1 and network=shared elbo.kl_weight=2."
    )
    assert "seed" not in said


def test_folders_of_former_code_are_of_the_group_that_they_would_be_of_today(folder: Path) -> None:
    write_run("runs/new", "elbo.weight_samples=3", seed=0)
    path = write_run("runs/old", "elbo.weight_samples=3", seed=1) / "config.yaml"
    text = path.read_text().replace("weight_samples: 3", "particles: 3")
    path.write_text(re.sub(r"\n +scale: paper(?=\n)", "", text))
    (section,) = sections()
    (group,) = section.groups
    assert len(group.runs) == 2
    assert section.differences == []


# numbers


def test_the_numbers_of_the_tables_are_those_of_the_runs(command: Command, folder: Path) -> None:
    for seed in range(4):
        write_run(f"runs/a{seed}", "network=shared", seed=seed, scores={"left": 0.1 * seed, "right": 1.0})
        write_run(f"runs/b{seed}", "network=lora", seed=seed, scores={"left": 0.9, "right": 1.0})
    outcome = command("report", "compare", "runs/a*", "runs/b[0-9]", "out=report")
    assert outcome.code == 0, outcome.err
    assert "written: report/report.html" in outcome.out
    shared, lora = rows("report/groups.csv")
    assert (shared["group"], shared["measure"], shared["scored_runs"]) == ("shared", "success", "4")
    assert float(shared["mean"]) == pytest.approx((0.15 + 1.0) / 2)
    assert float(shared["worst_1"]) == pytest.approx(0.15)
    assert float(shared["iqm"]) == pytest.approx((0.2 + 0.3 + 1.0 + 1.0) / 4)  # of eight, two off at either end
    assert float(shared["mean_low"]) < float(shared["mean"]) < float(shared["mean_high"])
    assert (lora["iqm"], lora["stored_parameters"], lora["worst_3"]) == ("0.95", "400", "")
    scores = {(row["group"], row["seed"], row["task"]): float(row["success"]) for row in rows("report/scores.csv")}
    assert len(scores) == 16
    assert scores["shared", "3", "left"] == pytest.approx(0.3)
    (pair,) = rows("report/improvement.csv")
    assert (pair["group"], pair["against"], pair["probability"]) == ("shared", "lora", "0.25")  # 0 and a tie
    tex = Path("report/groups.tex").read_text()
    assert r"lora & 4 & $0.950$ [$0.950$, $0.950$]" in tex
    pictures = {path.name for path in Path("report/figures").iterdir()}
    names = ("learning", "tasks_learning", "aggregates", "tasks", "profiles", "improvement", "parameters")
    assert pictures == {f"pointmass_{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")}


def test_curves_go_as_far_as_all_runs_and_at_compares_where_asked(folder: Path) -> None:
    write_run("runs/a0", seed=0, scores={"left": 0.4, "right": 0.8})
    write_run("runs/a1", seed=1, scores={"left": 0.8, "right": 0.8})
    (section,) = sections()
    curve = section.groups[0].curves["transitions"]
    assert curve.at.tolist() == [250, 500, 1000]
    assert curve.tasks.row(0).points.tolist() == pytest.approx([0.15, 0.3, 0.6])
    assert curve.iqm.points.tolist() == pytest.approx([0.2, 0.4, 0.8])  # of four, one off at either end
    assert section.groups[0].curves["seconds"].at.tolist() == [2.5, 6.25, 10.0]
    (section,) = sections(at=500)
    assert section.groups[0].scores.tolist() == [[0.2, 0.4], [0.4, 0.4]]
    assert section.groups[0].curves["transitions"].at.tolist() == [250, 500]


def test_scores_of_evaluation_json_on_demand(command: Command, folder: Path, no_figures: None) -> None:
    for seed in range(2):
        path = write_run(f"runs/a{seed}", seed=seed)
        if seed == 0:
            document = json.loads((path / "summary.json").read_text())
            document["tasks"]["left"]["success"] = 0.75
            (path / "evaluation.json").write_text(json.dumps(document))
    outcome = command("report", "compare", "runs", "evaluation=true")
    assert outcome.code == 0, outcome.err
    assert "left out: runs/a1 has no evaluation.json" in " ".join(outcome.out.split())
    assert [row["success"] for row in rows("report_compare/scores.csv")] == ["0.75", "1"]


# what is in the way


def test_runs_that_cannot_be_compared_are_warned_of(folder: Path) -> None:
    write_run("runs/a0", "network=shared", seed=0, reward_function_version="v2")
    write_run("runs/a1", "network=shared", seed=1, reward_function_version="v1", goals_per_task=50)
    write_run("runs/b0", "network=lora", "evaluate.episodes=9", seed=0, horizon=80, reward_function_version="v2")
    write_run("runs/b1", "network=lora", transitions=2000, seed=1, reward_function_version="v2")
    (section,) = sections()
    said = "\n".join(section.warnings).replace("network=shared total_transitions=1000", "shared")
    assert "Runs differ in horizon: 40 in shared and " in said
    assert "Runs differ in reward_function_version: v2 in shared (seed 0)" in said
    assert "v1 in shared (seed 1)" in said
    assert "Runs differ in goals_per_task: null in shared (seed 0)" in said
    assert "Runs differ in evaluate.episodes: 2 in" in said
    assert "Runs differ in the number of transitions: 1,000 in" in said
    assert "at=1000 compares them there" in said
    assert "Three runs or fewer of " in said
    assert not [line for line in sections(at=1000)[0].warnings if "number of transitions" in line]


def test_comparable_runs_are_not_warned_of(folder: Path) -> None:
    for seed in range(4):
        for network in ("shared", "lora"):
            write_run(f"runs/{network}{seed}", f"network={network}", seed=seed, transitions=1000 + seed)
    (section,) = sections()
    assert len(section.groups) == 8  # other budgets are other configurations
    for seed in range(4):
        for network in ("shared", "lora"):
            write_run(f"same/{network}{seed}", f"network={network}", seed=seed)
    (section,) = sections("same")
    assert section.warnings == []
    assert section.notes == []


def test_a_stopped_run_is_said_to_be_one_and_counts_in_curves_alone(folder: Path) -> None:
    write_run("runs/a0", seed=0)
    path = write_run("runs/a1", seed=1, finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"transitions": 600, "sec')  # killed while it wrote
    (section,) = sections()
    (group,) = section.groups
    assert section.warnings[0] == (
        "varshare_lora, seed 1, was stopped or still runs: 500 of 1,000 transitions (runs/a1). Its curve counts, "
        "its scores do not."
    )
    assert [run.seed for run in group.scored] == [0]
    assert group.curves["transitions"].at.tolist() == [250, 500]
    assert len(sections(at=500)[0].groups[0].scored) == 2


def test_in_the_course_of_training_nothing_is_of_the_end(folder: Path) -> None:
    write_run("runs/a", nats=3.0, sharing=0.5)
    (end,), (half,) = sections(), sections(at=500)
    (row,), (earlier,) = group_rows([end]), group_rows([half])
    assert (row["mean_nats"], row["sharing"]) == (3.0, 0.5)
    assert earlier["mean_nats"] is earlier["sharing"] is None
    assert 0 < float(str(earlier["seconds"])) < float(str(row["seconds"]))
    assert (end.moment, half.moment) == ("at the end", "at 500 transitions")


def test_a_configuration_and_seed_that_are_there_twice_count_once(folder: Path) -> None:
    write_run("runs/a", seed=0)
    write_run("runs/b", seed=0)
    (section,) = sections()
    assert len(section.groups[0].runs) == 1
    assert section.warnings[0] == "runs/b has the configuration and the seed of runs/a: it is left out."


def test_of_two_the_one_that_came_farther_counts(folder: Path) -> None:
    write_run("runs/a", seed=0, finished=False)
    write_run("runs/b", seed=0)
    (section,) = sections()
    assert [str(run.folder) for run in section.groups[0].scored] == ["runs/b"]
    assert section.warnings[0] == "runs/a has the configuration and the seed of runs/b: it is left out."


def test_one_seed_has_no_intervals_and_that_is_said(command: Command, folder: Path, no_figures: None) -> None:
    write_run("runs/a", "network=shared")
    write_run("runs/b", "network=lora")
    outcome = command("report", "compare", "runs")
    assert outcome.code == 0, outcome.err
    assert "one run, no interval" in outcome.out
    assert [row["iqm_low"] for row in rows("report_compare/groups.csv")] == ["", ""]
    assert "one run, no interval" in Path("report_compare/report.html").read_text()
    assert "of three runs or fewer, too narrow: shared, lora" in Path("report_compare/groups.tex").read_text()


@pytest.mark.slow
def test_suites_have_sections_of_their_own_and_their_own_measure(command: Command, folder: Path) -> None:
    for seed in range(2):
        write_run(f"runs/p{seed}", "env=pointmass", seed=seed, nats=3.0, sharing=0.9)
        write_run(f"runs/c{seed}", "env=cartpole", seed=seed, success=False, scores={"short": 50.0, "long": 20.0})
        write_run(f"runs/q{seed}", "env=pointmass", seed=seed, scores={"up": 0.5})
    outcome = command("report", "compare", "runs")
    assert outcome.code == 0, outcome.err
    found = {
        row["suite"]: (row["measure"], row["mean"], row["mean_nats"]) for row in rows("report_compare/groups.csv")
    }
    assert found == {
        "cartpole": ("return", "350", ""),
        "pointmass: 2 tasks, left, right": ("success", "0.75", "3"),
        "pointmass: 1 task, up": ("success", "0.5", ""),
    }
    drawn = {path.stem for path in Path("report_compare/figures").iterdir() if "sharing" in path.stem}
    assert drawn == {"pointmass_2_tasks_left_right_sharing"}


# the page


class Resources(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


def test_the_page_needs_no_other_file_and_shows_hostile_names_as_they_are(command: Command, folder: Path) -> None:
    hostile = '<script>alert("1")</script>'
    scores = {hostile: 0.1, "_$x^{$ & % #": 0.9}
    for network in ("shared", "lora"):
        write_run(f"runs/<img src=x>{network}", f"network={network}", scores=scores, horizon=hostile)
    outcome = command("report", "compare", "runs")
    assert outcome.code == 0, outcome.err
    text = Path("report_compare/report.html").read_text()
    page = Resources()
    page.feed(text)
    assert {item.partition(",")[0].partition("#")[0] for item in page.found} <= {"data:image/svg+xml;base64", ""}
    assert not re.search(r"https?:|url\(|@import|file:", text)
    assert "script" not in page.tags
    assert page.tags.count("img") == 7  # the figures alone
    assert "&lt;script&gt;alert" in text
    assert "&lt;img src=x&gt;shared" in text
    assert r"\_\$x\textasciicircum{}\{\$" not in Path("report_compare/groups.tex").read_text()  # groups only


# what a user can get wrong


def test_a_damaged_summary_is_one_line_and_the_others_are_compared(
    command: Command, folder: Path, no_figures: None
) -> None:
    write_run("runs/a")
    path = write_run("runs/b", seed=1) / "summary.json"
    path.write_text('{"tasks": {"left"')
    outcome = command("report", "compare", "runs")
    assert outcome.code == 0, outcome.err
    said = [line for line in outcome.out.splitlines() if "left out" in line]
    assert len(said) == 1
    assert "cannot read runs/b/summary.json" in " ".join(outcome.out.split())
    assert "Left out: cannot read runs/b/summary.json" in Path("report_compare/report.html").read_text()
    outcome = command("report", "compare", "runs/b", "out=other")
    assert_one_line(outcome.code, outcome.err, "cannot read runs/b/summary.json")
    assert not Path("other").exists()


@pytest.mark.parametrize("document", ["[]", '{"tasks": 3}', '{"tasks": {"left": {}}, "conditions": {}}', "\xff"])
def test_summaries_of_another_form_are_damaged(command: Command, folder: Path, document: str) -> None:
    path = write_run("runs/a") / "summary.json"
    path.write_bytes(document.encode("latin-1"))
    outcome = command("report", "compare", "runs")
    assert_one_line(outcome.code, outcome.err, "cannot read runs/a/summary.json")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "no runs to compare"),
        (("nowhere",), "nothing is called nowhere"),
        (("runs/*7",), "nothing is called runs/*7"),
        (("empty",), "no run in empty"),
        (("runs", "measure=luck"), "measure is 'luck'"),
        (("runs", "at=0"), "at is 0"),
        (("runs", "at=5", "evaluation=true"), "give one of them"),
        (("runs", "out=taken"), "taken"),
    ],
)
def test_mistakes_are_one_line(command: Command, folder: Path, arguments: tuple[str, ...], named: str) -> None:
    write_run("runs/a")
    Path("empty").mkdir()
    Path("taken").write_text("mine")
    outcome = command("report", "compare", *arguments)
    assert_one_line(outcome.code, outcome.err, named)
    assert not Path("report_compare").exists()


def test_sequences_and_runs_without_an_evaluation_are_left_out(
    command: Command, folder: Path, no_figures: None
) -> None:
    write_run("runs/a")
    (write_run("runs/b", seed=1, finished=False) / "metrics.jsonl").write_text("")
    sequence = write_run("runs/c", seed=2) / "config.yaml"
    sequence.write_text("method: {name: ewc}\n" + sequence.read_text())
    outcome = command("report", "compare", "runs")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "left out: runs/b has no evaluation yet" in said
    assert "left out: runs/c is a sequence of tasks" in said


def test_every_option_of_a_run_has_its_sentence(folder: Path) -> None:
    config: TrainConfig = load_config(write_run("runs/a") / "config.yaml")
    assert option_sentence(config, "elbo.kl_weight") != ""
    assert option_sentence(config, "network.name").startswith("The layers of the networks")
    assert option_sentence(config, "network.no_such") == ""
    assert option_sentence(config, "nothing.there.name") == ""
