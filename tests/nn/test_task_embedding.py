"""The embedding is appended, and its length does not matter."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from varshare_rl.nn import TaskEmbeddingLayer


def test_equals_a_linear_layer_on_the_longer_input() -> None:
    layer = TaskEmbeddingLayer(4, 3, num_tasks=2, embedding=2).double()
    with torch.no_grad():
        layer.embeddings.copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    units = torch.tensor([[0.6, 0.8], [0.0, -1.0]], dtype=torch.float64)
    longer = torch.cat([x, units.unsqueeze(1).expand(2, 5, 2)], dim=-1)
    torch.testing.assert_close(layer(x, torch.arange(2)), F.linear(longer, layer.theta, layer.bias))


def test_embeddings_start_with_unit_norm_and_keep_it_in_use() -> None:
    layer = TaskEmbeddingLayer(4, 3, num_tasks=6, embedding=8)
    torch.testing.assert_close(layer.embeddings.norm(dim=-1), torch.ones(6))
    x = torch.randn(6, 5, 4)
    before = layer(x, torch.arange(6))
    with torch.no_grad():
        layer.embeddings.mul_(3.0)
    torch.testing.assert_close(layer(x, torch.arange(6)), before)
