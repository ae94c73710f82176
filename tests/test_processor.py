"""What the operating system says of the processor, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from varshare_rl.processor import processor

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Xeon: the second

processor\t: 1
vendor_id\t: Other
"""


@pytest.mark.parametrize(
    ("field", "expected"),
    [("vendor_id", "GenuineIntel"), ("model name", "Xeon: the second"), ("processor", "0"), ("bogus", "")],
)
def test_a_field_is_that_of_the_first_core(monkeypatch: pytest.MonkeyPatch, field: str, expected: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *given, **options: CPUINFO)
    assert processor.__wrapped__(field) == expected


def test_a_system_without_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: Any, **options: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert processor.__wrapped__("vendor_id") == ""
