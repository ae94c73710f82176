"""LoRA adapters for many tasks on any PyTorch module: ``python examples/adapters.py``."""

import sys
import tempfile

import torch
from torch import nn

from varshare_rl.adapters import apply_lora

if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    lora = apply_lora(model, ["0", "2"], rank=4)  # freezes the model
    tasks = {"sum": lambda x: x.sum(1, keepdim=True), "difference": lambda x: x[:, :1] - x[:, 1:2]}
    for task, target in tasks.items():
        lora.add(task)
        lora.activate(task)
        optimizer = torch.optim.Adam(lora.parameters(task), lr=0.01)
        for _ in range(steps):
            x = torch.randn(64, 4)
            loss = (model(x) - target(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{task}: loss {loss.item():.3f}")

    x = torch.ones(2, 4)
    with lora.rows(["sum", "difference"]):  # each row of a batch has its own adapter
        print("sum and difference of ones:", model(x).flatten().tolist())
    with tempfile.TemporaryDirectory() as folder:
        lora.save("sum", folder)  # in the format of the peft library
        lora.load(folder, "again")
