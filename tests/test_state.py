"""State that is declared once goes out and comes back, nested and under the names of checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from varshare_rl.state import Stateful


class Counter(Stateful):
    state_fields = ("count", "seen=recent")

    def __init__(self, count: int) -> None:
        self.count, self.recent = count, [count]


class Trainer(Counter):
    state_fields = ("inner", "network", "optimizer", "temperature", "extra?")

    def __init__(self, count: int) -> None:
        super().__init__(count)
        torch.manual_seed(count)
        self.inner = Counter(count + 1)
        self.network = nn.Linear(2, 1)
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.temperature = nn.Parameter(torch.tensor([float(count)]))
        self.extra = "fresh"


def test_state_comes_back_in_place_and_bases_go_first() -> None:
    first, second = Trainer(1), Trainer(5)
    first.network(torch.ones(1, 2)).sum().backward()
    first.optimizer.step()
    tree = first.state()
    assert list(tree) == ["count", "seen", "inner", "network", "optimizer", "temperature", "extra"]
    kept = (second.inner, second.network, second.temperature)
    second.load_state(tree)
    assert kept == (second.inner, second.network, second.temperature)
    assert second.count == 1
    assert second.recent == [1]
    assert second.inner.count == 2
    assert torch.equal(second.network.weight, first.network.weight)
    assert second.temperature.item() == 1.0
    assert second.optimizer.state_dict()["state"].keys() == first.optimizer.state_dict()["state"].keys()


def test_only_optional_entries_may_be_missing() -> None:
    tree = Trainer(1).state()
    del tree["extra"]
    target = Trainer(2)
    target.load_state(tree)
    assert target.extra == "fresh"
    del tree["count"]
    with pytest.raises(KeyError, match="count"):
        target.load_state(tree)
