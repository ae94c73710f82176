"""LoRA for any module: named adapters on a frozen base, one for all rows or one for each row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import Adapter, adapter_scale, describe, fresh_adapter
from varshare_rl.adapters.folder import read_adapter, write_adapter
from varshare_rl.adapters.layer import LoRALinear, Selection
from varshare_rl.errors import UserError
from varshare_rl.nn.layer import check_positive


def apply_lora(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
) -> AdapterSet:
    """Freeze ``model`` and give its linear modules room for adapters, in place.

    Nothing of what it computes changes until an adapter is active.

    Args:
        model: any module. What is targeted must be plain ``nn.Linear``.
        target_modules: paths or dotted ends of paths in a list (``["q_proj", "v_proj"]``), or one regular
            expression that matches whole paths.
        rank, alpha: of adapters that are added without their own; alpha is the adapter's rank unless given, so
            that ``alpha / r`` is 1.
        dropout: on the input of adapters, in training.
        rslora: scale ``alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``alpha / r``.

    Raises:
        UserError: a target matches nothing or something that cannot be adapted, or ``model`` has adapters already.
        ValueError: rank, alpha or dropout out of range.
    """
    check_positive(rank=rank, **({} if alpha is None else {"alpha": alpha}))
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(isinstance(module, LoRALinear) for module in modules.values()):
        raise UserError("the model has adapters already; add to those, or unload them first")
    targets = find_targets(modules, target_modules)
    selection = Selection()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    layers = {path: LoRALinear(base, selection) for path, base in targets.items()}
    for path, layer in layers.items():
        layer.train(layer.base.training)
        model.set_submodule(path, layer)
    return AdapterSet(model, layers, selection, learned, _Defaults(rank, alpha, dropout, rslora))


@dataclass(frozen=True)
class _Defaults:
    rank: int
    alpha: float | None
    dropout: float
    rslora: bool


class AdapterSet:
    """The adapters of one model; made by :func:`apply_lora`.

    Attributes:
        model: the module that was given, now with :class:`LoRALinear` in place of its targets.
        layers: those layers by path.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, LoRALinear],
        selection: Selection,
        learned: list[nn.Parameter],
        defaults: _Defaults,
    ) -> None:
        self.model, self.layers = model, layers
        self._selection, self._learned, self._defaults = selection, learned, defaults
        self._names: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order in which they were added; a row's integer id is a position in it."""
        return tuple(self._names)

    @property
    def active(self) -> str | None:
        """The adapter that serves all rows, None for the base alone."""
        return self._selection.names[0] if self._selection.names and self._selection.ids is None else None

    @property
    def merged(self) -> str | None:
        """The adapter that is folded into the base weights."""
        return self._selection.merged

    def add(
        self, name: str, adapter: Adapter | None = None, rank: int | None = None, alpha: float | None = None
    ) -> None:
        """Add an adapter: the given factors (copied), or fresh ones that change nothing yet.

        Fresh: ``a`` uniform on ``+-1 / sqrt(in)`` (Kaiming, as ``torch.nn.Linear``), ``b = 0``. New parameters
        learn, so an optimiser must be given them (:meth:`parameters`).

        Raises:
            UserError: the name is taken or unusable, or the factors do not fit the targeted modules.
        """
        if adapter is None:
            adapter = self._fresh(rank, alpha)
        elif rank is not None or alpha is not None:
            raise ValueError("rank and alpha are those of the given factors; give either")
        self._set(name, adapter, self._defaults.dropout)

    def remove(self, name: str) -> None:
        """Forget an adapter; integer ids of those added after it move down by one.

        Raises:
            UserError: there is none of this name, or it is merged, or rows have adapters of their own.
        """
        self._known(name)
        self._check_no_rows()
        if self.merged == name:
            raise UserError(f"adapter {name!r} is merged into the base; unmerge before removing it")
        if self.active == name:
            self.activate(None)
        for layer in self.layers.values():
            layer.remove_factors(name)
        self._names.remove(name)

    def activate(self, name: str | None) -> None:
        """Apply one adapter to all rows; None for the base alone.

        Raises:
            UserError: there is none of this name, or another is merged.
        """
        if name is not None:
            self._known(name)
        self._check_not_merged(name)
        self._selection.names, self._selection.ids = (() if name is None else (name,)), None

    @contextmanager
    def rows(self, adapters: Sequence[str] | Tensor) -> Iterator[None]:
        """Give every row of a batch the adapter that is named for it; after the block all is as before.

        Rows are the first dimension of what each adapted layer receives: ``[N, F]``, ``[N, length, F]`` or
        task-major ``[T, B, F]``. Gradients reach the adapters of the rows and no others.

        Args:
            adapters: a name for each row, or integers ``[N]``, positions in :attr:`names`.

        Raises:
            UserError: an unknown name, or an adapter is merged.
            IndexError: an unknown id.
            ValueError: ids that are no vector of integers.
        """
        self._check_not_merged(None)
        used, ids = self._row_ids(adapters)
        before = self._selection.names, self._selection.ids
        self._selection.names, self._selection.ids = used, ids
        try:
            yield
        finally:
            self._selection.names, self._selection.ids = before

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of one adapter, for an optimiser."""
        self._known(name)
        return [
            factor for layer in self.layers.values() if name in layer.settings for factor in layer.factors(name)
        ]

    def adapter(self, name: str) -> Adapter:
        """Return copies of one adapter's factors."""
        self._known(name)
        found = {path: layer.low_rank(name) for path, layer in self.layers.items()}
        return {path: factors for path, factors in found.items() if factors is not None}

    def save(self, name: str, folder: Path | str, base_model: str | None = None) -> None:
        """Write one adapter as a folder that :meth:`load` and the `peft` library read."""
        adapter = self.adapter(name)
        dropout = next(layer.settings[name].dropout for layer in self.layers.values() if name in layer.settings)
        write_adapter(folder, adapter, describe(adapter, base_model, self._defaults.rslora, dropout))

    def load(self, folder: Path | str, name: str) -> None:
        """Add an adapter from a folder that :meth:`save` or the `peft` library wrote, with the file's dropout.

        Raises:
            UserError: as :func:`read_adapter` and :meth:`add`.
        """
        adapter, info = read_adapter(folder)
        self._set(name, adapter, info.dropout)

    def merge(self, name: str | None = None) -> None:
        """Fold one adapter (the active one unless named) into the base weights; nothing if that is done already.

        Raises:
            UserError: none is active or known, another is merged, rows have adapters of their own, it holds a NaN
                or an infinity, or a weight also serves another module.
        """
        self._check_no_rows()
        name = self.active if name is None else name
        if name is None:
            raise UserError("no adapter is active; name the one to merge")
        self._known(name)
        self._check_not_merged(name)
        if self.merged == name:
            return
        self._check_mergeable(name)
        for layer in self.layers.values():
            layer.merge(name)
        self._selection.names, self._selection.ids, self._selection.merged = (name,), None, name

    def unmerge(self) -> None:
        """Put the base weights back bit for bit; nothing if none is merged. The adapter stays active."""
        for layer in self.layers.values():
            layer.unmerge()
        self._selection.merged = None

    def unload(self) -> nn.Module:
        """Take the adapters off and return the model with its own layers again, learning as it did before.

        What is merged stays in the weights, so ``merge`` and ``unload`` give the plain model of one adapter.
        """
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer.base)
        for parameter in self._learned:
            parameter.requires_grad_(True)
        self.layers, self._names = {}, []
        return self.model

    def _fresh(self, rank: int | None, alpha: float | None) -> Adapter:
        rank = self._defaults.rank if rank is None else rank
        alpha = self._defaults.alpha if alpha is None else alpha
        check_positive(rank=rank, **({} if alpha is None else {"alpha": alpha}))
        scale = adapter_scale(alpha, rank, self._defaults.rslora)
        return fresh_adapter({path: layer.base for path, layer in self.layers.items()}, rank, scale)

    def _set(self, name: str, adapter: Adapter, dropout: float) -> None:
        if not name or "." in name:
            raise UserError(f"an adapter cannot be called {name!r}; give a name without dots")
        if name in self._names:
            raise UserError(f"there is an adapter {name!r} already; remove it first or choose another name")
        if not adapter:
            raise UserError(f"adapter {name!r} has no factors; give those of at least one module")
        for path, factors in adapter.items():
            if path not in self.layers:
                raise UserError(
                    f"adapter {name!r} has factors for {path}, which is not among the adapted modules "
                    f"({listed(list(self.layers))}); choose other target_modules"
                )
            base = self.layers[path].base
            if (factors.in_features, factors.out_features) != (base.in_features, base.out_features):
                raise UserError(
                    f"adapter {name!r} maps {factors.in_features} to {factors.out_features} at {path}, where the "
                    f"model maps {base.in_features} to {base.out_features}; it belongs to another model"
                )
        for path, factors in adapter.items():
            self.layers[path].set_factors(name, factors, dropout)
        self._names.append(name)

    def _known(self, name: str) -> None:
        if name not in self._names:
            raise UserError(f"unknown adapter {name!r}; there are {listed(self._names) or 'none yet'}")

    def _check_not_merged(self, wanted: str | None) -> None:
        if self.merged is not None and self.merged != wanted:
            raise UserError(f"adapter {self.merged!r} is merged into the base; unmerge before using another")

    def _check_no_rows(self) -> None:
        if self._selection.ids is not None:
            raise UserError("rows have adapters of their own here; leave the block of rows(...) first")

    def _check_mergeable(self, name: str) -> None:
        owners: dict[int, list[str]] = {}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(path)
        for path, factors in self.adapter(name).items():
            if not factors.is_finite():
                raise UserError(f"adapter {name!r} holds a NaN or an infinity at {path}; it is not merged")
            shared = owners[id(self.layers[path].base.weight)]
            if len(shared) > 1:
                raise UserError(
                    f"the weight of {path} serves other modules too ({listed(shared)}); it is not merged"
                )

    def _row_ids(self, adapters: Sequence[str] | Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Return the adapters in use, and for each row its position among them."""
        if isinstance(adapters, Tensor):
            ids = adapters.cpu()
            if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
                raise ValueError(f"ids of shape {tuple(ids.shape)} and dtype {ids.dtype}; give integers [N]")
            outside = (ids < 0) | (ids >= len(self._names))
            if bool(outside.any()):
                raise IndexError(
                    f"unknown adapter id {int(ids[outside][0])}: there are {len(self._names)} adapters"
                )
        else:
            for name in dict.fromkeys(adapters):
                self._known(name)
            position = {name: index for index, name in enumerate(self._names)}
            ids = torch.tensor([position[name] for name in adapters], dtype=torch.int64)
        used, rows = torch.unique(ids, return_inverse=True)
        return tuple(self._names[index] for index in used.tolist()), rows


def find_targets(modules: dict[str, nn.Module], wanted: Sequence[str] | str) -> dict[str, nn.Linear]:
    """Return the modules that ``wanted`` names, by path.

    Raises:
        UserError: a name matches nothing, or something that is no plain linear module.
    """
    found: dict[str, nn.Linear] = {}
    for target in [wanted] if isinstance(wanted, str) else wanted:
        paths = [path for path in modules if path and _is_target(path, target, isinstance(wanted, str))]
        if not paths:
            linear = listed([path for path, module in modules.items() if path and type(module) is nn.Linear])
            raise UserError(f"target_modules: {target!r} matches nothing; linear modules are {linear or 'none'}")
        for path in paths:
            module = modules[path]
            if type(module) is not nn.Linear:
                raise UserError(
                    f"target_modules: {target!r} matches {path}, a {type(module).__name__}; "
                    "only plain nn.Linear can be adapted"
                )
            found[path] = module
    if not found:
        raise UserError("target_modules is empty; name at least one linear module")
    for module in found.values():
        paths = [other for other, same in modules.items() if same is module]
        if len(paths) > 1:
            raise UserError(f"target_modules: {listed(paths)} are one and the same module; it cannot be adapted")
    return found


def _is_target(path: str, target: str, is_pattern: bool) -> bool:
    if not is_pattern:
        return path == target or path.endswith(f".{target}")
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise UserError(f"target_modules is no regular expression: {target!r} ({error})") from error


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names with commas, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
