from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from naive import scramble
from torch import nn

from varshare_rl.nn import VarShareLayer, VarShareLoRALayer
from varshare_rl.nn.variational import noise_to_weight, prior_sigma, residual_sigma

LAYERS = {
    "varshare_lora": lambda: VarShareLoRALayer(6, 5, 3, rank=2, alpha=3.0, prior_scale=0.4),
    "varshare": lambda: VarShareLayer(6, 5, 3, prior_scale=0.4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_sigma_equals_monte_carlo(name: str) -> None:
    layer = LAYERS[name]().double()
    scramble(layer)
    with torch.no_grad():
        noise = layer.draw_noise(30_000)
        for task in range(3):
            factors = layer.drawn(noise, 1.0, torch.full((30_000,), task))
            residual = factors[0] if name == "varshare" else layer.scale * factors[1] @ factors[0]
            rms = residual.var(0).mean().sqrt().item()
            assert residual_sigma(layer)[task].item() == pytest.approx(rms, rel=0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_sigma_at_the_prior(name: str) -> None:
    layer = LAYERS[name]()
    with torch.no_grad():
        for mu, rho in layer.posteriors():
            mu.zero_()
            rho.fill_(float(torch.tensor(0.4).expm1().log()))
    torch.testing.assert_close(prior_sigma(layer), residual_sigma(layer))


def test_noise_to_weight_is_a_mean_over_layers_and_tasks() -> None:
    layers = [LAYERS["varshare"](), LAYERS["varshare_lora"]()]
    now, prior = noise_to_weight([nn.Sequential(layers[0]), layers[1]])
    by_hand = [(residual_sigma(layer) / layer.theta.detach().square().mean().sqrt()).mean() for layer in layers]
    assert now == pytest.approx(float(sum(by_hand)) / 2)
    assert prior > now
    sigma = F.softplus(torch.tensor(-5.0))
    torch.testing.assert_close(residual_sigma(layers[0]), sigma.expand(3))
    with pytest.raises(ValueError, match="no layer has a posterior"):
        noise_to_weight([nn.Linear(2, 2)])
