"""The linear layers of a model that can be corrected: their names, their sizes, and what takes their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from varshare_rl.errors import UserError

#: All linear layers but the model's output head.
ALL_LINEAR = "all-linear"
#: Names of query, key, value and output projections; a row counts where a module has all but the last of its names.
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj")),
    ("q", "k", "v", ("o", "out")),
    ("query", "key", "value", ("output", "out")),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
    ("to_q", "to_k", "to_v", ("to_out",)),
    ("c_attn", ("c_proj",)),
    ("qkv_proj", ("o_proj", "out_proj")),
    ("query_key_value", ("dense",)),
    ("Wqkv", ("out_proj", "Wo")),
)  # fmt: skip


def find_targets(model: nn.Module, wanted: Sequence[str] | str | None) -> dict[str, nn.Module]:
    """Return the linear layers that ``wanted`` names, by path; one that stands at several paths by its first.

    Args:
        model: any module.
        wanted: paths or dotted ends of paths in a list, one regular expression that matches whole paths,
            ``"all-linear"`` for all but the output head, or None for the projections of attention.

    Raises:
        UserError: a name matches nothing, or something that cannot be corrected.
    """
    modules = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and ".parametrizations." not in f".{path}."
    }
    if wanted is None or wanted == ALL_LINEAR:
        return _chosen(model, modules, all_of_them=wanted is not None)
    found: dict[str, nn.Module] = {}
    for target in [wanted] if isinstance(wanted, str) else wanted:
        paths = [path for path in modules if _is_target(path, target, isinstance(wanted, str))]
        if not paths:
            raise UserError(f"target_modules: {target!r} matches nothing; {_there_are(modules)}")
        for path in paths:
            reason = refusal(modules[path])
            if reason is not None:
                raise UserError(f"target_modules: {target!r} matches {path}, {reason}")
            if all(modules[path] is not other for other in found.values()):
                found[path] = modules[path]
    if not found:
        raise UserError("target_modules is empty; name at least one linear module")
    return found


def refusal(module: nn.Module) -> str | None:
    """Return the reason for which a module cannot be corrected, None if it can."""
    kind = f"a {type(module).__name__}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return f"{kind}, whose weight attention uses without calling it; it cannot be adapted"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"{kind}; only linear layers can be adapted: nn.Linear, and Conv1D of transformers"
    weight: Any = module.weight
    if is_lazy(weight):
        return f"{kind} whose sizes are not known yet; run the model once before"
    if weight.dim() != 2 or not weight.is_floating_point():
        return (
            f"{kind} whose weight is {tuple(weight.shape)} of {weight.dtype}; give one of floating point [out, in]"
        )
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Return True for the linear layer of GPT-2, whose weight is stored ``[in, out]``."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor)


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight ``[out, in]`` of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight


def made_weight(module: nn.Module) -> bool:
    """Return True if a layer makes its weight anew at every call, as weight_norm and prune have it."""
    return "weight" not in module._parameters


def put_in_place(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, at every path where those stand."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new and parent is not new[child]:
                setattr(parent, name, new[child])


def nesting_encoders(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.TransformerEncoder]:
    """Return PyTorch's encoders that hand nested tensors, which their fused kernels alone take, to these layers."""
    mine = set(layers)
    encoders = (module for module in model.modules() if isinstance(module, nn.TransformerEncoder))
    return [each for each in encoders if each.use_nested_tensor and not mine.isdisjoint(each.modules())]


def clean_path(path: str) -> str:
    """Return a module's path without what ``torch.compile`` puts into it (``_orig_mod``)."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def clean_paths(paths: Sequence[str]) -> dict[str, str]:
    """Return paths as in the plain model, by the paths of a compiled one, or of one wrapped as ``module``.

    The name ``module`` at the beginning goes if all paths have it, as in data-parallel models.

    Raises:
        UserError: two paths become one.
    """
    cleaned = {path: clean_path(path) for path in paths}
    if cleaned and all(path.startswith("module.") for path in cleaned.values()):
        cleaned = {path: short.removeprefix("module.") for path, short in cleaned.items()}
    if len(set(cleaned.values())) < len(cleaned):
        raise UserError(f"paths of the same module in plain and compiled form: {listed(list(paths))}; give one")
    return cleaned


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names with commas, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _chosen(model: nn.Module, modules: Mapping[str, nn.Module], all_of_them: bool) -> dict[str, nn.Module]:
    """Return all linear layers but the output head, or the projections of attention."""
    fit = {path: module for path, module in modules.items() if refusal(module) is None}
    if all_of_them:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {path: module for path, module in fit.items() if module is not output}
    else:
        chosen = {path: fit[path] for path in _projections(model) if path in fit}
    if not chosen:
        what = "linear layer" if all_of_them else "projection of attention (q_proj, query, c_attn, ...)"
        raise UserError(f"target_modules: the model has no {what} that it could mean; {_there_are(modules)}")
    unique: dict[nn.Module, str] = {}
    for path, module in chosen.items():
        unique.setdefault(module, path)
    return {path: module for module, path in unique.items()}


def _projections(model: nn.Module) -> Iterator[str]:
    for path, parent in model.named_modules():
        prefix = f"{path}." if path else ""
        for *inputs, outputs in ATTENTION:
            if all(name in parent._modules for name in inputs):
                yield from (f"{prefix}{name}" for name in (*inputs, *outputs) if name in parent._modules)
                if path.endswith("attention.self"):  # BERT keeps the output projection beside it
                    yield f"{path.removesuffix('self')}output.dense"


def _is_target(path: str, target: str, is_pattern: bool) -> bool:
    if not is_pattern:
        return path == target or path.endswith(f".{target}")
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise UserError(f"target_modules is no regular expression: {target!r} ({error})") from error


def _there_are(modules: Mapping[str, nn.Module]) -> str:
    linear = [path for path, module in modules.items() if refusal(module) is None]
    return f"linear modules are {listed(linear) or 'none'}"
