"""The experiments on Share measure what they say; nothing here looks at a time."""

from __future__ import annotations

import argparse

import pytest
import torch

from experiments.share_fifty.__main__ import criteria, page
from experiments.share_fifty.rules import DIGITS, LENGTH, UNKNOWN, Transformer, accuracy, loss_of, sequences
from experiments.share_scale.measure import LAYERS, POLICIES, adapter, run


@pytest.mark.parametrize("policy", POLICIES)
def test_every_way_to_take_in_adapters(policy: str) -> None:
    rows = run(policy, tasks=6, batch=3)
    assert [row["tasks"] for row in rows] == [3, 6]
    for row in rows:
        assert 0.0 < row["mean_error"] <= row["worst_error"] <= row["worst_reported_error"] + 1e-4
        assert row["worst_error"] < 0.15
        assert row["lora_bytes"] == row["tasks"] * 4 * 8 * sum(out + into for out, into in LAYERS.values())
    assert rows[1]["decompositions"] == (1 if "needed" in policy and rows[1]["k"] == rows[0]["k"] else 2)


def test_adapters_are_always_the_same() -> None:
    for name, factors in adapter(7).items():
        assert torch.equal(factors.delta(), adapter(7)[name].delta())
        assert not torch.equal(factors.delta(), adapter(8)[name].delta())


def test_answers_follow_the_rule() -> None:
    tokens, answers = sequences(torch.tensor([[2, 7], [0, 0]]), True, torch.Generator().manual_seed(0))
    digits = tokens[:, 2:]
    assert tokens[0, :2].tolist() == [DIGITS + 2, DIGITS + 6 + 7]
    assert answers[0, :2].tolist() == [-1, -1]
    assert torch.equal(answers[0, 2:], (digits[0, : LENGTH - 2] + 7) % DIGITS)
    assert torch.equal(answers[1], digits[1])
    hidden, _ = sequences(torch.tensor([[2, 7]]), False, torch.Generator().manual_seed(0))
    assert hidden[0, :2].tolist() == [UNKNOWN, UNKNOWN]


def test_the_criteria_are_stated_one_by_one() -> None:
    def share(seen: float, fresh: float, total: int) -> dict[str, object]:
        return {
            "seen": seen,
            "held out, coefficients only (p = 1)": fresh,
            "times fewer": 32.0,
            "storage": {"total_bytes": total, "lora_bytes": 100},
        }

    result = {"families": 3, "LoRA per task": {"seen": 1.0, "held out": 0.9}}
    _, _, parity, one_model, coefficients = criteria(
        {**result, "Share, k = 1": share(0.98, 0.895, 101), "Share, k = 2": share(0.995, 0.5, 50)}
    )
    assert "| not met: 0.980 of 1.000 | met: 0.995 of 1.000 |" in parity
    assert "| not met: 1.01 of the bytes | met: 0.50 of the bytes |" in one_model
    assert "| met: 0.895 of 0.900, 32 times fewer trained | not met: 0.500 of 0.900" in coefficients


def test_a_model_that_knows_nothing_guesses() -> None:
    model = Transformer(width=16)
    assert accuracy(model, (1, 3)) < 0.3
    loss = loss_of(model, *sequences(torch.tensor([[1, 3]]), False, torch.Generator().manual_seed(0)))
    assert 1.5 < float(loss.detach()) < 4.0


def test_no_answer_depends_on_what_comes_later() -> None:
    model = Transformer(width=16).eval()
    tokens, _ = sequences(torch.tensor([[1, 3]]), False, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % DIGITS
    before, after = model(tokens).detach(), model(changed).detach()
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_the_table() -> None:
    pair = {"seen": 0.5, "held out": 0.25}
    own = {
        "seen": 0.75,
        "held out, coefficients only (p = 1)": 0.5,
        "held out, averaged coefficients": 0.125,
        "trained parameters of a new task": 128,
        "LoRA's trained parameters": 8192,
        "storage": {"total_bytes": 1000.0},
    }
    table = page({"base": pair, "LoRA per task": pair, "Share, k = 16": own}, argparse.Namespace(families=50))
    assert "| Share, k = 16 | 0.750 | 0.500 (averaged: 0.125) | 128 | 1000 |" in table
    assert f"| LoRA per task | 0.500 | 0.250 | 8192 | {4 * 8192 * 50} |" in table
