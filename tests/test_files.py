import json
import os
from pathlib import Path

import numpy as np
import pytest

from varshare_rl.errors import UserError
from varshare_rl.files import to_json, whole_folder, write_atomically, write_json


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


def test_a_folder_appears_whole_and_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with whole_folder(target) as hidden:
        (hidden / "inner").mkdir()
        write_atomically(hidden / "inner" / "file", "one")
        assert not target.exists()
    with whole_folder(target) as hidden:
        write_atomically(hidden / "other", "two")
        assert (target / "inner" / "file").read_text() == "one"
    assert os.listdir(target) == ["other"]
    assert os.listdir(target.parent) == ["folder"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_half(target: Path) -> None:
    with whole_folder(target) as hidden:
        (hidden / "file").write_text("half")
        raise RuntimeError("stop")


def test_a_failure_leaves_the_old_folder_or_none(tmp_path: Path) -> None:
    for target in (tmp_path / "deep" / "er" / "new", tmp_path / "old"):
        if target.name == "old":
            target.mkdir()
            (target / "file").write_text("kept")
        with pytest.raises(RuntimeError, match="stop"):
            write_half(target)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old" / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/below"), whole_folder(tmp_path / "file" / "below"):
        pass
