import io
import re
from collections.abc import Mapping

import pytest

from varshare_rl.run import console as module
from varshare_rl.run.console import Console, counted

ROWS: Mapping[str, Mapping[str, float | None]] = {
    "reach-v3": {"return": 1234.5, "success": 0.5, "KL": 41234.0},
    "button-press-topdown-wall-v3": {"return": 2000.0, "success": 0.25, "KL": None},
}
BRACKETS = "env.tasks=[reach-v3,/bold]"  # rich would take this for markup


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_plain_line_every_half_minute(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(1_000_000, stream=stream) as console:
        console.progress(400_000, {})  # a resumed run: its rate must not count these
        for second in range(1, 62):
            clock.now = float(second)
            console.progress(400_000 + 2000 * second, {"mean success": 0.5, "mean return": 1234.5})
    assert stream.getvalue().splitlines() == [
        "410,000 / 1,000,000 transitions | 2,000/s | 0:04:55 left | mean success 0.50 | mean return 1,234",
        "460,000 / 1,000,000 transitions | 2,000/s | 0:04:30 left | mean success 0.50 | mean return 1,234",
        "520,000 / 1,000,000 transitions | 2,000/s | 0:04:00 left | mean success 0.50 | mean return 1,234",
    ]


def test_rate_is_that_of_the_last_half_minute(clock: Clock) -> None:
    console = Console(10**6, stream=io.StringIO())
    assert console.transitions_per_second == 0
    console.progress(0, {})
    assert console.transitions_per_second == 0
    transitions = 0
    for second in range(1, 101):
        clock.now = float(second)
        transitions += 10 if second <= 60 else 1000
        console.progress(transitions, {})
    assert console.transitions_per_second == pytest.approx(1000)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_plain_table(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")  # a terminal that knows no control characters is treated as a file
    monkeypatch.setenv("COLUMNS", "20")
    Console(1, stream=stream).table("Evaluation at 100 transitions", ROWS)
    lines = stream.getvalue().splitlines()
    assert lines[0].strip() == "Evaluation at 100 transitions"
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["task"] == ["return", "success", "KL"]
    assert cells["reach-v3"] == ["1,234", "0.50", "41,234"]
    assert cells["button-press-topdown-wall-v3"] == ["2,000", "0.25", "-"]
    assert cells["mean"] == ["1,617", "0.38", "41,234"]
    assert max(map(len, lines)) <= 100
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_column_of_nothing_and_single_task() -> None:
    stream = io.StringIO()
    Console(1, stream=stream).table("t", {"cartpole": {"return": 9.0, "success": None}})
    assert re.search(r"cartpole +9.00 +-", stream.getvalue())
    assert "mean" not in stream.getvalue()


def test_long_text_is_neither_wrapped_nor_taken_for_markup() -> None:
    stream = io.StringIO()
    console = Console(1, stream=stream)
    command = f"python -m varshare_rl.train resume=runs/{'x' * 150} {BRACKETS}"
    console.message(command)
    console.describe("Run [1]", {"suite": BRACKETS, "network": "y" * 120})
    console.table(BRACKETS, {BRACKETS: {BRACKETS: 1.0}})
    lines = stream.getvalue().splitlines()
    assert lines[:4] == [command, "Run [1]", f"  suite    {BRACKETS}", f"  network  {'y' * 120}"]
    assert sum(line.count(BRACKETS) for line in lines[4:]) == 3


def test_output_that_knows_only_ascii_gets_a_table() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as stream:
        Console(1, stream=stream).table("t", ROWS)
        stream.flush()
        assert b"reach-v3" in raw.getvalue()


def test_terminal_shows_a_live_line_and_is_put_back(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Console(20_000_000, stream=stream) as console:
        console.describe("Run", {"suite": "[a suite]"})
        console.progress(0, {})
        clock.now = 2000.0
        console.progress(10_000_000, {"mean success": 0.75, BRACKETS: 1.0})
        console.table("Evaluation", ROWS)
        console.message("a message")
    output = stream.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "━ 10,000,000 / 20,000,000 transitions | 5,000/s | 0:33:20 left" in text
    assert f"mean success 0.75 | {BRACKETS} 1.00" in text
    assert "[a suite]" in text
    assert "reach-v3" in text
    assert "a message" in text
    assert output.index("\x1b[?25l") < output.rindex("\x1b[?25h")  # the cursor: hidden, then shown


def test_terminal_is_put_back_after_an_interrupt() -> None:
    def interrupted(stream: Terminal) -> None:
        with Console(1000, stream=stream) as console:
            console.progress(1, {})
            raise KeyboardInterrupt

    stream = Terminal()
    with pytest.raises(KeyboardInterrupt):
        interrupted(stream)
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_leaves_only_messages(stream: io.StringIO, clock: Clock) -> None:
    with Console(1000, quiet=True, stream=stream) as console:
        console.describe("Run", {"a": "b"})
        console.progress(0, {})
        clock.now = 60.0
        console.progress(600, {"x": 1.0})
        console.table("t", ROWS)
        console.message("saved")
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).strip() == "saved"
    assert console.transitions_per_second == 10


def test_forced_colours_move_no_cursor_in_a_file(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(1000, stream=stream) as console:
        console.describe("title", {"name": "value"})
        console.progress(0, {})
        clock.now = 31.0
        console.progress(500, {})
        console.table("evaluation", ROWS)
    assert "500 / 1,000 transitions" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


LONG = ["button-press-topdown-wall-v3", "plate-slide-back-side-v3", *(f"task-{number}-v3" for number in range(48))]


def plain(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_broken_or_too_wide(width: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    row = {"success": 0.5, "final": 0.25, "return": -1234.5, "steps": 500.0, "nats": 12345.0}
    with Console(200_000_000, stream=stream) as console:
        console.describe("mt50", {"run folder": f"runs/{'x' * 39}", "tasks": f"50 ({', '.join(LONG)})"})
        console.progress(0, {})
        clock.now = 100.0
        console.progress(123_456_789, {"success": 0.5})
        console.table("evaluation", dict.fromkeys(LONG[:3], row))
    text = plain(stream)
    assert max(map(len, text.splitlines())) <= width
    for name in (*LONG, "x" * 39, "-1,234", "0.50"):
        assert name in text
    assert ("12,345" in text, "500.0" in text) == (width >= 80, width >= 80)
    assert re.search(r"123,456,789 / 200,000,000|123.46M / 200M", text)
    assert "1,234,568/s | 0:01:02 left" in text


def test_of_many_tasks_the_worst_and_the_others_together() -> None:
    rows: Mapping[str, Mapping[str, float | None]] = {
        f"task-{number}": {"success": (number * 7 % 50) / 100, "return": float(number)} for number in range(50)
    }
    shown, whole = io.StringIO(), io.StringIO()
    Console(1, stream=shown).table("evaluation", rows)
    Console(1, stream=whole, all_tasks=True).table("evaluation", rows)
    cells = {
        " ".join(line.split()[:-2]): line.split()[-2:] for line in shown.getvalue().splitlines() if line.strip()
    }
    assert [name for name in cells if name.startswith("task-")] == [
        f"task-{number}" for number in sorted(range(50), key=lambda number: number * 7 % 50)[:10]
    ]
    others = [number for number in range(50) if number * 7 % 50 >= 10]
    assert cells["40 others"] == [f"{sum(range(10, 50)) / 40 / 100:.2f}", f"{sum(others) / 40:.1f}"]
    assert cells["mean"] == ["0.24", "24.5"]
    lines = [line.split()[0] for line in whole.getvalue().splitlines() if line.strip().startswith("task-")]
    assert lines == list(rows)


def test_the_line_moves_without_a_line_of_metrics(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Console(1000, stream=stream) as console:
        console.progress(0, {})
        for tick in range(1, 11):
            clock.now = 0.5 * tick
            console.progress(tick)
            assert console._progress.tasks[0].completed == tick


def test_time_left_is_of_learning_and_known_within_five_seconds(clock: Clock) -> None:
    """A thousand a second while a replay memory fills, then ten: 900 are left when five seconds of it are over."""
    console = Console(10_950, stream=io.StringIO())
    console.progress(0, {})
    for second in range(1, 11):
        clock.now = float(second)
        console.progress(1000 * second, updated=False)
    assert console._counts().endswith("| ? left")
    for second in range(11, 16):
        clock.now = float(second)
        console.progress(10_000 + 10 * (second - 10))
    assert console._counts() == "10,050 / 10,950 transitions | 10/s | 0:01:30 left"


def test_days_are_named() -> None:
    assert [module._duration(seconds) for seconds in (59.6, 3600 * 47, 3600 * 75.5)] == [
        "0:01:00",
        "47:00:00",
        "3 d 3 h",
    ]


def test_one_is_no_plural() -> None:
    assert [counted(number, "episode") for number in (1, 2, 1000)] == ["1 episode", "2 episodes", "1,000 episodes"]
