"""Plain networks in files: weights as safetensors with the modules as JSON, nothing pickled.

``network.json`` lists the modules of an ``nn.Sequential`` with their arguments; ``network.safetensors`` is its
state dict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from varshare_rl.errors import UserError, one_line
from varshare_rl.files import write_atomically, write_json
from varshare_rl.reading import STUMBLES, read_object

FORMAT_VERSION = 1
MODULE_FILE = "network.json"
TENSOR_FILE = "network.safetensors"

#: Maker of every kind of module, and the attributes that are its arguments.
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps")),
    "ReLU": (nn.ReLU, ()),
    "Tanh": (nn.Tanh, ()),
    "SiLU": (nn.SiLU, ()),
    "ELU": (nn.ELU, ("alpha",)),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope",)),
    "Softmax": (nn.Softmax, ("dim",)),
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
        with torch.device("meta"):  # sizes that a document claims take no memory
            network = nn.Sequential(*(_build(dict(module)) for module in document["modules"]))
        tensors = {name: tensor.float() for name, tensor in load_file(folder / TENSOR_FILE).items()}
        network.load_state_dict(tensors, assign=True)
    except UserError:
        raise
    except STUMBLES as error:
        raise UserError(f"cannot read the network {folder}: {one_line(error)}") from error
    return network.eval()


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    if kind not in _KINDS:
        raise UserError(f"a {kind} cannot be written; modules that can are {', '.join(_KINDS)}")
    special: dict[str, Any] = {}
    if isinstance(module, nn.Linear):
        special["bias"] = module.bias is not None
    return {"kind": kind, **{name: special.get(name, getattr(module, name, None)) for name in _KINDS[kind][1]}}


def _build(description: dict[str, Any]) -> nn.Module:
    make, names = _KINDS[description.pop("kind")]
    arguments = {name: description.pop(name) for name in names}
    if description:
        raise ValueError(f"unknown argument {next(iter(description))!r}")
    if empty := [name for name in ("in_features", "out_features") if arguments.get(name, 1) == 0]:
        raise ValueError(f"{empty[0]} is 0")
    module: nn.Module = make(**arguments)
    return module
