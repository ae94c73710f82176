"""The table of Gymnasium's environments holds, and has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.gymnasium_ids import PAGE, ids, row

ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "-v" in line]


def test_every_id_is_in_the_table_and_resumes_or_is_refused() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in ROWS] == [
        env_id
        for family in ("classic_control", "box2d", "mujoco", "toy_text")
        for at, env_id in ids()
        if at == family
    ]
    assert all(line.split(" | ")[2].startswith(("bitwise", "refused: ")) for line in ROWS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("line", ROWS)
def test_a_row(folder: Path, line: str) -> None:
    cells = row(line.split(" | ")[0].removeprefix("| "))
    assert f"| {' | '.join(cells)} |" == line
