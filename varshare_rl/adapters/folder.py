"""Adapter folders of the `peft` library: ``adapter_config.json`` and ``adapter_model.safetensors``.

Format of peft 0.21: the factors of module ``m`` are ``base_model.model.m.lora_A.weight [r, in]`` and
``.lora_B.weight [out, r]``; the configuration says their scale. Neither reading nor writing needs `peft`, and
nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from varshare_rl.adapters.adapter import Adapter, AdapterInfo, LowRank, describe
from varshare_rl.adapters.targets import clean_path, clean_paths
from varshare_rl.errors import UserError, one_line
from varshare_rl.files import whole_folder, write_atomically, write_json
from varshare_rl.reading import STUMBLES, check_pattern, read_object

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
#: Files that an adapter folder may hold; they are replaced, but for the last, which is written by `peft` or a user.
OWN_FILES = (CONFIG_FILE, TENSOR_FILE, README_FILE)

_PREFIX = "base_model.model."
_FACTORS = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
#: A copy of the base's own weight, which `peft` adds for adapted embeddings and output heads.
_BASE_WEIGHT = ".base_layer.weight"

#: Settings that do not change what the factors mean, and those that are read.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
#: Ways to start the factors that leave the base weights alone.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
#: Settings with which the factors alone do not say what the model computes.
_REFUSED = {
    "use_dora": "DoRA normalises the sum of weight and correction",
    "lora_bias": "it has biases on its factors",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it trains rows of embeddings",
    "target_parameters": "it adapts parameters that are no linear module's weight",
    "use_qalora": "it is quantised (QALoRA)",
    "loftq_config": "it belongs to a quantised base (LoftQ)",
    "corda_config": "it belongs to base weights that CorDA changed",
    "lora_ga_config": "it belongs to base weights that LoRA-GA changed",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts only after certain tokens (aLoRA)",
}


def write_adapter(
    folder: Path | str, adapter: Adapter, info: AdapterInfo | None = None, made_by: str | None = None
) -> None:
    """Write an adapter folder that `peft` loads, whole or not at all.

    Paths are written as those of the plain model, see :func:`clean_paths`.

    Args:
        folder: is made, or replaced if it holds an adapter and nothing else; a README.md in it is kept.
        adapter: the factors; each scale becomes an alpha.
        info: from :func:`describe` or :func:`read_adapter`; without one nothing is known of the base model.
            Target modules are always written as the exact paths of ``adapter``.
        made_by: whose work the file is, see :func:`maker`.

    Raises:
        UserError: there are no factors, two of them are for one module, ``info`` states another rank or scale, or
            the folder holds other files.
    """
    if info is not None:
        _check_stated(adapter, info)
    short = clean_paths(list(adapter))
    adapter = {short[path]: factors for path, factors in adapter.items()}
    exact = describe(adapter)
    if info is not None:
        exact = describe(adapter, info.base_model, info.rslora, info.dropout)
        exact = replace(exact, fan_in_fan_out=info.fan_in_fan_out)
    folder = Path(folder)
    check_replaceable(folder, "an adapter", OWN_FILES)
    tensors = {}
    for module, factors in adapter.items():
        for factor, ending in _FACTORS.items():
            tensor: Tensor = getattr(factors, factor)
            tensors[_PREFIX + module + ending] = tensor.detach().cpu().clone().contiguous()
    metadata = {"format": "pt"} if made_by is None else {"format": "pt", "made_by": made_by}
    with whole_folder(folder) as hidden:
        write_atomically(hidden / TENSOR_FILE, save(tensors, metadata))
        write_json(hidden / CONFIG_FILE, _config_of(exact))
        if (folder / README_FILE).is_file():
            shutil.copy2(folder / README_FILE, hidden / README_FILE, follow_symlinks=False)


def is_adapter(folder: Path | str) -> bool:
    """Return True if a folder holds a file of an adapter."""
    return any((Path(folder) / name).exists() for name in (CONFIG_FILE, TENSOR_FILE))


def maker(folder: Path | str) -> str | None:
    """Return what :func:`write_adapter` was told about whose work an adapter folder is; None without."""
    try:
        with safe_open(Path(folder) / TENSOR_FILE, "pt") as file:
            return (file.metadata() or {}).get("made_by")
    except (SafetensorError, OSError):
        return None


def read_adapter(folder: Path | str) -> tuple[Adapter, AdapterInfo]:
    """Read a LoRA folder that :func:`write_adapter` or `peft` wrote; tensors are on the CPU.

    Mixed ranks, alpha patterns and rank-stabilised scales are understood; the scale of every module is worked
    out from them. Copies of the base's own weights in the file are left to :func:`read_base_weights`.

    Raises:
        UserError: a file is missing or damaged, or the adapter is of a kind that cannot be read; names it.
    """
    folder = Path(folder)
    info = _read_info(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(folder).items():
        if not key.endswith(_BASE_WEIGHT):
            module, factor = _parse_key(folder, key)
            found.setdefault(module, {})[factor] = tensor
    if not found:
        raise UserError(f"cannot read the adapter {folder}: {TENSOR_FILE} holds no factors")
    return {module: _factors(folder, module, pair, info) for module, pair in sorted(found.items())}, info


def read_base_weights(folder: Path | str) -> dict[str, Tensor]:
    """Read the copies of the base's own weights ``[out, in]`` that `peft` adds for adapted output heads, by module.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(Path(folder) / TENSOR_FILE, "pt") as file:
            keys = file.keys()
            weights = {key: file.get_tensor(key) for key in keys if key.endswith(_BASE_WEIGHT)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {Path(folder) / TENSOR_FILE}: it is missing or damaged ({error})") from error
    return {clean_path(key.removeprefix(_PREFIX).removesuffix(_BASE_WEIGHT)): weights[key] for key in weights}


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSOR_FILE
    if not file.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        cure = (
            f"{pickled[0]} is pickled, which is never read; save it as safetensors" if pickled else "it is missing"
        )
        raise UserError(f"cannot read the adapter {folder}: no {TENSOR_FILE} ({cure})")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: it is damaged ({error})") from error


def _config_of(info: AdapterInfo) -> dict[str, Any]:
    """Return the configuration in `peft`'s words; a whole number is written as one."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": info.base_model,
        "r": info.rank,
        "lora_alpha": _whole(info.alpha),
        "rank_pattern": dict(info.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in info.alpha_pattern.items()},
        "use_rslora": info.rslora,
        "lora_dropout": info.dropout,
        "target_modules": info.target_modules,
        "fan_in_fan_out": info.fan_in_fan_out,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
    }


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _check_stated(adapter: Adapter, info: AdapterInfo) -> None:
    for module, factors in adapter.items():
        stated = info.rank_of(module), info.scale_of(module)
        if stated[0] != factors.rank or abs(stated[1] - factors.scale) > 1e-9 * abs(factors.scale):
            raise UserError(
                f"the information states rank {stated[0]} and scale {stated[1]:g} for {module}, whose factors have "
                f"rank {factors.rank} and scale {factors.scale:g}; make it with describe(adapter)"
            )


def check_replaceable(folder: Path, content: str, own_files: Sequence[str]) -> None:
    """Refuse to write some ``content`` to a file, or to a folder that holds other files than its own."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write {content} to {folder}: it is a file; give a folder")
    others = sorted(path.name for path in folder.glob("*") if path.name not in own_files)
    if others:
        raise UserError(
            f"cannot write {content} to {folder}: it holds other files ({others[0]}); give a new folder"
        )


def _read_info(folder: Path) -> AdapterInfo:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"no {CONFIG_FILE} in {folder}; give the folder of a LoRA adapter")
    config = read_object(file)
    try:
        _check_kind(folder, config)
        targets = config.get("target_modules") or ()
        for pattern in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
            check_pattern(pattern)
        info = AdapterInfo(
            base_model=config.get("base_model_name_or_path"),
            rank=int(config.get("r", 8)),  # the defaults are those of peft
            alpha=float(config.get("lora_alpha", 8)),
            rank_pattern={str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            rslora=bool(config.get("use_rslora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
        for alpha in (info.alpha, *info.alpha_pattern.values()):
            if not math.isfinite(alpha):
                raise ValueError(f"lora_alpha is {alpha}")
        if not 0.0 <= info.dropout < 1.0:
            raise ValueError(f"lora_dropout is {info.dropout}")
    except UserError:
        raise
    except STUMBLES as error:
        raise UserError(f"cannot read {file}: {one_line(error)}") from error
    return info


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what the factors alone do not describe; a setting we do not know counts only when it is set."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"cannot read the adapter {folder}: its peft_type is {kind!r}, and only LORA can be read")
    for key, value in config.items():
        if key in _HARMLESS or not _is_set(value):
            continue
        if key == "bias":
            reason = None if value == "none" else "it trains biases of the base"
        elif key == "init_lora_weights":
            reason = None if value in _INITIALISATIONS else "this start may change the base weights"
        else:
            reason = _REFUSED.get(key, "that is a setting unknown to this version")
        if reason:
            raise UserError(f"cannot read the adapter {folder}: {key}={json.dumps(value)}: {reason}")


def _is_set(value: Any) -> bool:
    """Return False for null, false and 0, and for what holds nothing else."""
    if isinstance(value, Mapping):
        return any(map(_is_set, value.values()))
    return any(map(_is_set, value)) if isinstance(value, list) else bool(value)


def _parse_key(folder: Path, key: str) -> tuple[str, str]:
    """Return the module and the factor (``a`` or ``b``) that a tensor's name stands for."""
    for factor, ending in _FACTORS.items():
        if key.startswith(_PREFIX) and key.endswith(ending):
            return key[len(_PREFIX) : -len(ending)], factor
    reasons = {
        "lora_embedding": "adapters of embeddings cannot be read",
        "lora_magnitude": "DoRA cannot be read",
        "lora_B.bias": "biases on factors cannot be read",
    }
    reason = next((text for part, text in reasons.items() if part in key), "it is no factor of a linear module")
    raise UserError(f"cannot read the adapter {folder}: tensor {key}: {reason}")


def _factors(folder: Path, module: str, pair: Mapping[str, Tensor], info: AdapterInfo) -> LowRank:
    if len(pair) < 2:
        raise UserError(f"cannot read the adapter {folder}: {module} has only factor {next(iter(pair)).upper()}")
    for tensor in pair.values():
        if tensor.dim() != 2:
            raise UserError(
                f"cannot read the adapter {folder}: {module} has factors of shape {tuple(tensor.shape)}; "
                "only those of linear modules can be read, not of convolutions"
            )
        if not tensor.is_floating_point():
            raise UserError(f"cannot read the adapter {folder}: {module} has factors of type {tensor.dtype}")
    a, b, rank = pair["a"], pair["b"], info.rank_of(module)
    if rank < 1 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"cannot read the adapter {folder}: {module} has factors of rank {a.shape[0]} and {b.shape[1]}, and "
            f"{CONFIG_FILE} states {rank}"
        )
    return LowRank(a, b, info.scale_of(module))
