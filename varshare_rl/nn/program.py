"""Modules as files that run without this package: programs of ``torch.export``, and ONNX graphs."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically

INPUT, OUTPUT = "observation", "action"


def any_rows() -> tuple[dict[int, Any]]:
    """Return the shapes of an input of any number of rows; ``torch.export`` takes a second to import."""
    return ({0: torch.export.Dim("batch", min=1)},)


def trace(module: nn.Module, size: int) -> torch.export.ExportedProgram:
    """Trace a module from ``[B, size]`` float32, for any number of rows.

    Raises:
        UserError: it does what cannot be traced.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(module, (torch.zeros(2, size),), dynamic_shapes=any_rows())
    except Exception as error:  # whatever the module's own code does when it is traced
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"this network cannot be traced by torch.export: {reason}") from error
    program.example_inputs = None
    return program


def write_pt2(file: Path, program: torch.export.ExportedProgram, about: Mapping[str, str]) -> None:
    """Write what ``torch.export.load`` reads; ``about`` are text files inside, by name."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(about))
    write_atomically(file, buffer.getvalue())


def write_onnx(file: Path, program: torch.export.ExportedProgram, about: Mapping[str, str]) -> None:
    """Write an ONNX graph ``observation [batch, F]`` to ``action``; ``about`` is its metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # packages that it does not find are not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter calls functions of torch that are to go
        graph: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=any_rows(),
        )
    graph.model.metadata_props.update(about)
    graph.save(file)


def read_pt2(file: Path) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]:
    """Return the function of a program in a file, from and to arrays."""
    module = torch.export.load(file).module()

    def run(x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        with torch.no_grad():
            result: torch.Tensor = module(torch.from_numpy(x))
        return result.numpy()

    return run


def read_onnx(file: Path) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]] | None:
    """Return the function of a graph in a file, from and to arrays; None where onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {INPUT: x})[0]
