"""The modulation."""

from __future__ import annotations

import pytest
import torch

from varshare_rl.errors import UserError
from varshare_rl.nn import FiLMConfig, Posterior
from varshare_rl.nn.film import FeatureModulation
from varshare_rl.nn.task_rows import task_rows


def test_scale_and_shift_by_hand() -> None:
    modulation = FeatureModulation(2, 2)
    with torch.no_grad():
        modulation.scales.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.5]]))
        modulation.shifts.copy_(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
    h = torch.tensor([[[4.0, 5.0]], [[6.0, 8.0]]])
    y = modulation(h, task_rows(h, torch.arange(2), 2))
    assert y.tolist() == [[[8.0, 3.0]], [[7.0, 12.0]]]


def test_the_modulation_comes_after_the_norm() -> None:
    """Before it, a LayerNorm would take a scale of all features away again."""
    network = FiLMConfig(hidden=[8], layer_norm=True).build(5, 2, 2, Posterior())
    x = torch.randn(6, 5)
    before = network(x, 0)
    with torch.no_grad():
        network.modulations[0].scales[0] = 1.0
    assert (network(x, 0) - before).abs().max() > 1e-2
    torch.testing.assert_close(network(x, 1), before)


def test_without_a_hidden_layer_there_is_nothing_to_modulate() -> None:
    with pytest.raises(UserError, match="network=film needs a hidden layer"):
        FiLMConfig(hidden=[]).build(5, 2, 2, Posterior())
