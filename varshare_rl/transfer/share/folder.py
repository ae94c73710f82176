"""A basis on disk: a folder of ``basis.json`` and safetensors files, whole or absent.

``basis.json`` has the options, the tasks with their norms and errors, and size and SHA-256 of the other files:
``tensors.safetensors`` (bases; the coefficients of all tasks side by side), and ``originals.safetensors`` where the
adapters are kept. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load, save
from torch import Tensor

from varshare_rl.adapters.adapter import Adapter, LowRank
from varshare_rl.adapters.folder import check_replaceable
from varshare_rl.errors import UserError, one_line
from varshare_rl.files import to_json, whole_folder, write_atomically
from varshare_rl.reading import STUMBLES, check_folder, read_bytes, read_object
from varshare_rl.transfer.share.config import BasisMethod, ShareConfig
from varshare_rl.transfer.share.delta_basis import DeltaBasis
from varshare_rl.transfer.share.layer_basis import Coefficients, LayerBasis
from varshare_rl.transfer.share.model import Share
from varshare_rl.types import Tree

FORMAT_VERSION = 1
#: Most bytes of a file of tensors that is read.
MOST_TENSOR_BYTES = 1 << 40
BASIS_FILE = "basis.json"
TENSOR_FILE = "tensors.safetensors"
ORIGINALS_FILE = "originals.safetensors"
OWN_FILES = (BASIS_FILE, TENSOR_FILE, ORIGINALS_FILE)


def write_basis(folder: Path | str, share: Share) -> None:
    """Write a basis folder, whole or not at all; one that is there is replaced.

    Raises:
        UserError: ``folder`` is a file, or holds something else than a basis.
    """
    folder = Path(folder)
    check_target(folder)
    files = {TENSOR_FILE: save(_tensors(share))}
    if share.originals:
        files[ORIGINALS_FILE] = save(_original_tensors(share))
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "options": OmegaConf.to_container(OmegaConf.structured(share.config), enum_to_str=True),
        **_described(share),
        "storage": share.storage().as_dict(),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    document["sha256"] = _digest(document)
    with whole_folder(folder) as hidden:
        for name, content in files.items():
            write_atomically(hidden / name, content)
        write_atomically(hidden / BASIS_FILE, to_json(document, indent=1) + "\n")


def check_target(folder: Path) -> None:
    """Refuse a path where no basis can be written: a file, or a folder that holds something else than a basis."""
    check_replaceable(folder, "a basis", OWN_FILES)


def read_basis(folder: Path | str) -> Share:
    """Read a basis folder, checking every byte.

    Raises:
        UserError: a file is missing, damaged or of another version; names it.
    """
    folder = Path(folder)
    check_folder(folder)
    document = _document(folder)
    try:
        stated = document["files"]
        files = {name: _content(folder / name, stated[name]) for name in OWN_FILES[1:] if name in stated}
        if "${" in to_json(document["options"]):
            raise ValueError("its options are to be looked up")
        config = OmegaConf.merge(OmegaConf.structured(ShareConfig), document["options"])
        made: Any = OmegaConf.to_object(config)
        originals = load(files[ORIGINALS_FILE]) if ORIGINALS_FILE in files else {}
        return _unpacked(document, load(files[TENSOR_FILE]), originals, made)
    except UserError:
        raise
    except STUMBLES as error:
        raise UserError(f"cannot read the basis {folder}: {one_line(error)}; make it again") from error


def share_state(share: Share) -> Tree:
    """Return a model as a tree for a checkpoint, without its options."""
    return {**_described(share), "tensors": _tensors(share), "originals": _original_tensors(share)}


def share_of(state: Tree, config: ShareConfig) -> Share:
    """Return the model of which :func:`share_state` made a tree."""
    return _unpacked(state, state["tensors"], state["originals"], config)


def _unpacked(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor], config: ShareConfig
) -> Share:
    layers = {name: _layer(name, of_layer, tensors, config) for name, of_layer in stated["layers"].items()}
    tasks = tuple(stated["tasks"])
    kept = _originals(tasks, originals) if originals else {}
    return Share(config, tasks, layers, tuple(stated["lora_numbers"]), kept, stated["merges"])


def _document(folder: Path) -> dict[str, Any]:
    file = folder / BASIS_FILE
    if not file.is_file():
        raise UserError(f"no {BASIS_FILE} in {folder}; give a folder that `share consolidate` wrote")
    document = read_object(file)
    version, stated = document.get("format_version"), document.pop("sha256", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version!r}, and this version reads {FORMAT_VERSION}")
    if stated != _digest(document):
        raise UserError(f"cannot read {file}: its content was changed; make it again")
    return document


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(document).encode()).hexdigest()


def _content(file: Path, stated: Mapping[str, Any]) -> bytes:
    if not file.is_file():
        raise UserError(f"cannot read the basis {file.parent}: {file.name} is missing; make it again")
    content = read_bytes(file, MOST_TENSOR_BYTES)
    if len(content) != stated["bytes"] or hashlib.sha256(content).hexdigest() != stated["sha256"]:
        raise UserError(f"cannot read {file}: its content was changed; make it again")
    return content


def _described(share: Share) -> dict[str, Any]:
    """Return all but the options and the tensors."""
    return {
        "tasks": list(share.tasks),
        "lora_numbers": list(share.lora_numbers),
        "merges": share.merges,
        "layers": {name: _describe(layer) for name, layer in share.layers.items()},
    }


def _describe(layer: LayerBasis | DeltaBasis) -> dict[str, Any]:
    described: dict[str, Any] = {"k": layer.k, "norms": list(layer.norms), "errors": list(layer.errors)}
    if isinstance(layer, LayerBasis):
        described["p"] = [own.eps_B.shape[1] for own in layer.coefficients]
        described["posterior"] = [own.std_B is not None for own in layer.coefficients]
    return described


def _tensors(share: Share) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in share.layers.items():
        if isinstance(layer, DeltaBasis):
            tensors |= {f"{name}.basis": layer.basis, f"{name}.coefficients": layer.coefficients}
            if layer.mean is not None:
                tensors[f"{name}.mean"] = layer.mean
            continue
        tensors |= {f"{name}.basis_B": layer.basis_B, f"{name}.basis_A": layer.basis_A}
        for part in ("eps_B", "eps_A", "std_B", "std_A"):
            columns = [getattr(own, part) for own in layer.coefficients]
            present = [column for column in columns if column is not None]
            if present:
                tensors[f"{name}.{part}"] = torch.cat(present, dim=1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _layer(
    name: str, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ShareConfig
) -> LayerBasis | DeltaBasis:
    norms, errors = tuple(stated["norms"]), tuple(stated["errors"])
    if config.method is BasisMethod.delta:
        basis, own = tensors[f"{name}.basis"], tensors[f"{name}.coefficients"]
        return DeltaBasis(basis, own, norms, errors, tensors.get(f"{name}.mean"))
    eps_B, eps_A = (torch.split(tensors[f"{name}.{part}"], stated["p"], dim=1) for part in ("eps_B", "eps_A"))
    widths = [p for p, posterior in zip(stated["p"], stated["posterior"], strict=True) if posterior]
    sigmas = [
        iter(torch.split(tensors[f"{name}.{part}"], widths, dim=1) if widths else ()) for part in ("std_B", "std_A")
    ]
    coefficients = tuple(
        Coefficients(
            b.contiguous(), a.contiguous(), *(next(std).contiguous() if posterior else None for std in sigmas)
        )
        for b, a, posterior in zip(eps_B, eps_A, stated["posterior"], strict=True)
    )
    return LayerBasis(tensors[f"{name}.basis_B"], tensors[f"{name}.basis_A"], coefficients, norms, errors)


def _original_tensors(share: Share) -> dict[str, Tensor]:
    return {
        f"{share.index(task)}.{name}.{part}": getattr(factors, part).contiguous()
        for task, adapter in share.originals.items()
        for name, factors in adapter.items()
        for part in ("a", "b")
    }


def _originals(tasks: tuple[str, ...], tensors: Mapping[str, Tensor]) -> dict[str, Adapter]:
    originals: dict[str, Adapter] = {task: {} for task in tasks}
    for key in sorted(tensors):
        if key.endswith(".a"):
            index, _, name = key.removesuffix(".a").partition(".")
            originals[tasks[int(index)]][name] = LowRank(tensors[key], tensors[f"{index}.{name}.b"])
    return originals
