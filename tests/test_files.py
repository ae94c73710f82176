import json
import os
from pathlib import Path

import numpy as np
import pytest

from varshare_rl.files import to_json, write_atomically, write_json


def test_write_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "a long first content")
    write_atomically(path, "größe")
    assert path.read_bytes() == "größe".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def fail(source: str, target: Path) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    value = {
        "nan": float("nan"),
        "inf": [float("-inf"), np.float32("inf")],
        "numpy": np.arange(3),
        "int": np.int64(7),
        "flag": True,
        "nested": {1: (1.5, None)},
        "path": Path("runs") / "x",
    }
    expected = {
        "nan": None,
        "inf": [None, None],
        "numpy": [0, 1, 2],
        "int": 7,
        "flag": True,
        "nested": {"1": [1.5, None]},
        "path": "runs/x",
    }

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not standard JSON")

    assert json.loads(to_json(value), parse_constant=refuse) == expected
    assert "\n" not in to_json(value)
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == expected
