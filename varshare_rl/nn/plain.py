"""Plain networks in files: weights as safetensors with the modules as JSON, nothing pickled, or ONNX graphs.

``network.json`` lists the modules of an ``nn.Sequential`` with their arguments; ``network.safetensors`` is its
state dict.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from varshare_rl.errors import UserError
from varshare_rl.files import write_atomically, write_json
from varshare_rl.nn.merge import Choose, Normalize
from varshare_rl.reading import STUMBLES, one_line, read_object

FORMAT_VERSION = 1
MODULE_FILE = "network.json"
TENSOR_FILE = "network.safetensors"
#: Bound on the difference of the ONNX file's actions from PyTorch's, on random observations.
ONNX_TOLERANCE = 1e-5


def _normalize(size: int, clip: float) -> Normalize:
    return Normalize(torch.zeros(size), torch.ones(size), clip)


#: Maker of every kind of module, and the attributes that are its arguments.
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps")),
    "ReLU": (nn.ReLU, ()),
    "Tanh": (nn.Tanh, ()),
    "SiLU": (nn.SiLU, ()),
    "ELU": (nn.ELU, ("alpha",)),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope",)),
    "Normalize": (_normalize, ("size", "clip")),
    "Choose": (Choose, ()),
}


def write_network(folder: Path, network: nn.Sequential) -> None:
    """Write a network of the kinds that this module knows into a folder that exists.

    Raises:
        UserError: the network has a module of another kind.
    """
    modules = [_describe(module) for module in network]
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    write_atomically(folder / TENSOR_FILE, save(tensors, {"format": "pt"}))
    write_json(folder / MODULE_FILE, {"format_version": FORMAT_VERSION, "modules": modules})


def read_network(folder: Path | str) -> nn.Sequential:
    """Read what :func:`write_network` wrote, in eval mode on the CPU.

    Raises:
        UserError: a file is missing, damaged or of another version; names it.
    """
    folder = Path(folder)
    for name in (MODULE_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {folder}; give the folder of an exported network")
    try:
        document = read_object(folder / MODULE_FILE)
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {document['format_version']!r}, and {FORMAT_VERSION} can be read")
        network = nn.Sequential(*(_build(dict(module)) for module in document["modules"]))
        network.load_state_dict(load_file(folder / TENSOR_FILE))
    except UserError:
        raise
    except STUMBLES as error:
        raise UserError(f"cannot read the network {folder}: {one_line(error)}") from error
    return network.eval()


def write_onnx(file: Path, policy: nn.Sequential, obs_size: int) -> bool:
    """Write an ONNX graph ``observation [batch, F]`` to ``action``; False if it could not be compared with PyTorch.

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


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    if kind not in _KINDS:
        raise UserError(f"a {kind} cannot be written; modules that can are {', '.join(_KINDS)}")
    special: dict[str, Any] = {}
    if isinstance(module, nn.Linear):
        special["bias"] = module.bias is not None
    if isinstance(module, Normalize):
        special["size"] = len(module.mean)
    return {"kind": kind, **{name: special.get(name, getattr(module, name, None)) for name in _KINDS[kind][1]}}


def _build(description: dict[str, Any]) -> nn.Module:
    make, names = _KINDS[description.pop("kind")]
    module: nn.Module = make(**{name: description.pop(name) for name in names})
    if description:
        raise ValueError(f"unknown argument {next(iter(description))!r}")
    return module
