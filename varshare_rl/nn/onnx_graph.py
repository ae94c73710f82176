"""Plain networks as ONNX graphs, compared with PyTorch where onnxruntime is there."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Of the ONNX file's actions against PyTorch's, on random observations.
ONNX_TOLERANCE = 1e-5


def write_onnx(file: Path, policy: nn.Sequential, obs_size: int) -> bool:
    """Write an ONNX graph ``observation [batch, F]`` to ``action``; whether it could be compared with PyTorch.

    Raises:
        RuntimeError: onnxruntime computes other actions.
    """
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(64, obs_size, generator=generator)
    batch = torch.export.Dim("batch", min=1)
    names: dict[str, Any] = {"input_names": ["observation"], "output_names": ["action"]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # packages that it does not find are not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter calls functions of torch that are to go
        program: Any = torch.onnx.export(
            policy, (obs,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},), **names
        )
    program.save(file)
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (actions,) = session.run(None, {"observation": obs.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(actions) - policy(obs)).abs().max().item()
    if difference > ONNX_TOLERANCE:
        raise RuntimeError(f"onnxruntime's actions differ from PyTorch's by {difference:g}")
    return True
