"""LoRA for any module: named adapters on a frozen base, one for all rows or one for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varshare_rl.adapters.adapter import (
    Adapter,
    AdapterInit,
    adapter_scale,
    describe,
    fresh_adapter,
    principal_factors,
)
from varshare_rl.adapters.folder import read_adapter, read_base_weights, write_adapter
from varshare_rl.adapters.layer import LoRALinear, Selection
from varshare_rl.adapters.targets import (
    clean_paths,
    find_targets,
    is_conv1d,
    linear_weight,
    listed,
    made_weight,
    nesting_encoders,
    put_in_place,
)
from varshare_rl.errors import UserError
from varshare_rl.nn.layer import check_positive


def apply_lora(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
) -> AdapterSet:
    """Freeze ``model`` and give its linear modules room for adapters, in place.

    Nothing of what it computes changes until an adapter is active.

    Args:
        model: any module. What is targeted must be ``nn.Linear``, or the Conv1D of `transformers`.
        target_modules: paths or dotted ends of paths in a list (``["q_proj", "v_proj"]``), one regular expression
            that matches whole paths, or ``"all-linear"`` for all but the output head; the projections of attention
            (query, key, value, output) unless given.
        rank: of adapters that are added without their own.
        alpha: the same; it is the adapter's rank unless given, so that ``alpha / r`` is 1.
        dropout: on the input of adapters, in training.
        rslora: scale ``alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``alpha / r``.

    Raises:
        UserError: a target matches nothing or something that cannot be adapted, or ``model`` has adapters already.
        ValueError: rank, alpha or dropout out of range.
    """
    check_positive(rank=rank, **({} if alpha is None else {"alpha": alpha}))
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("the model has adapters already; add to those, or unload them first")
    targets = find_targets(model, target_modules)
    selection = Selection()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    layers = {path: LoRALinear(base, selection) for path, base in targets.items()}
    for layer in layers.values():
        layer.train(layer.base.training)
    put_in_place(model, {layer.base: layer for layer in layers.values()})
    nesting = nesting_encoders(model, layers.values())
    for encoder in nesting:
        encoder.use_nested_tensor = False
    return AdapterSet(model, layers, selection, learned, nesting, _Defaults(rank, alpha, dropout, rslora))


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
        layers: those layers by path, a layer that stands at several by the first.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, LoRALinear],
        selection: Selection,
        learned: list[nn.Parameter],
        nesting: list[nn.TransformerEncoder],
        defaults: _Defaults,
    ) -> None:
        self.model, self.layers = model, layers
        self._selection, self._learned, self._nesting, self._defaults = selection, learned, nesting, defaults
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
        self,
        name: str,
        adapter: Adapter | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        init: str = "kaiming",
    ) -> None:
        """Add an adapter: the given factors (copied), or fresh ones that change nothing yet.

        New parameters learn, so an optimiser must be given them (:meth:`parameters`, :meth:`groups`).

        Args:
            name: without dots.
            adapter: factors by path; None: fresh ones.
            rank: of a fresh one.
            alpha: the same.
            init: of fresh ones: ``kaiming``, ``gaussian``, ``pissa`` or ``olora``. The last two start from a part
                of the base weight and subtract it from there on: the adapter is the difference, of twice the rank.

        Raises:
            UserError: the name is taken or unusable, or the factors do not fit the targeted modules.
        """
        start = None
        if adapter is not None:
            if rank is not None or alpha is not None:
                raise ValueError("rank and alpha are those of the given factors; give either")
            adapter = self._own_paths(name, adapter)
        else:
            adapter, start = self._fresh(rank, alpha, init)
        self._set(name, adapter, self._defaults.dropout, start)

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
            UserError: there is none of this name, another is merged, or rows have adapters of their own.
        """
        self._check_no_rows()
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

    def groups(self, name: str, learning_rate: float, b_ratio: float = 1.0) -> list[dict[str, Any]]:
        """Return one adapter's parameters as an optimiser's groups, ``B`` with ``b_ratio`` times the rate of ``A``.

        LoRA+ (Hayou et al. 2024, *LoRA+: Efficient Low Rank Adaptation of Large Models*) has ``b_ratio`` above 1.
        """
        check_positive(learning_rate=learning_rate, b_ratio=b_ratio)
        parameters = self.parameters(name)
        return [
            {"params": parameters[::2], "lr": learning_rate},
            {"params": parameters[1::2], "lr": learning_rate * b_ratio},
        ]

    def adapter(self, name: str) -> Adapter:
        """Return copies of one adapter's factors."""
        self._known(name)
        found = {path: layer.low_rank(name) for path, layer in self.layers.items()}
        return {path: factors for path, factors in found.items() if factors is not None}

    def save(self, name: str, folder: Path | str, base_model: str | None = None) -> None:
        """Write one adapter as a folder that :meth:`load` and the `peft` library read."""
        adapter = self.adapter(name)
        own = [layer for layer in self.layers.values() if name in layer.settings]
        info = describe(adapter, base_model, self._defaults.rslora, own[0].settings[name].dropout)
        write_adapter(folder, adapter, replace(info, fan_in_fan_out=any(is_conv1d(layer.base) for layer in own)))

    def load(self, folder: Path | str, name: str) -> None:
        """Add an adapter from a folder that :meth:`save` or the `peft` library wrote, with the file's dropout.

        Raises:
            UserError: as :func:`read_adapter` and :meth:`add`; or the file brings base weights that are others than
                the model's.
        """
        adapter, info = read_adapter(folder)
        adapter = self._own_paths(name, adapter)
        for path, weight in read_base_weights(folder).items():
            self._check_base_weight(folder, path, weight)
        self._set(name, adapter, info.dropout)

    def merge(self, name: str | None = None) -> None:
        """Fold one adapter (the active one unless named) into the base weights; nothing if that is done already.

        Raises:
            UserError: none is active or known, another is merged, rows have adapters of their own, the adapter or
                the merged weight holds a NaN or an infinity, or a weight also serves another module or is made anew
                at every call (weight norm, pruning). Nothing is changed then.
        """
        self._check_no_rows()
        name = self.active if name is None else name
        if name is None:
            raise UserError("no adapter is active; name the one to merge")
        self._known(name)
        self._check_not_merged(name)
        if self.merged == name:
            return
        merged = self._merged_weights(name)
        for path, weight in merged.items():
            self.layers[path].merge(weight)
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
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        put_in_place(self.model, {layer: layer.base for layer in self.layers.values()})
        for parameter in self._learned:
            parameter.requires_grad_(True)
        self.layers, self._names = {}, []
        return self.model

    def _fresh(self, rank: int | None, alpha: float | None, init: str) -> tuple[Adapter, Adapter | None]:
        """Return factors to train, and what they start from if that is to be subtracted."""
        inits = [each.value for each in AdapterInit]
        if init not in inits:
            raise ValueError(f"init is {init!r}; choose {', '.join(inits)}")
        kind = AdapterInit(init)
        rank = self._defaults.rank if rank is None else rank
        alpha = self._defaults.alpha if alpha is None else alpha
        check_positive(rank=rank, **({} if alpha is None else {"alpha": alpha}))
        scale = adapter_scale(alpha, rank, self._defaults.rslora)
        if not kind.principal:
            return fresh_adapter(self.layers, rank, scale, kind), None
        start = {
            path: principal_factors(linear_weight(layer.base), rank, scale, kind)
            for path, layer in self.layers.items()
        }
        return start, start

    def _own_paths(self, name: str, adapter: Adapter) -> Adapter:
        """Return an adapter by the paths of its modules here, be the model or the file's compiled or wrapped."""
        if all(path in self.layers for path in adapter):
            return adapter
        own = {short: path for path, short in clean_paths(list(self.layers)).items()}
        short = clean_paths(list(adapter))
        for path in adapter:
            if path not in self.layers and short[path] not in own:
                raise UserError(
                    f"adapter {name!r} has factors for {path}, which is not among the adapted modules "
                    f"({listed(list(self.layers))}); choose other target_modules"
                )
        return {path if path in self.layers else own[short[path]]: factors for path, factors in adapter.items()}

    def _set(self, name: str, adapter: Adapter, dropout: float, start: Adapter | None = None) -> None:
        if not name or "." in name:
            raise UserError(f"an adapter cannot be called {name!r}; give a name without dots")
        if name in self._names:
            raise UserError(f"there is an adapter {name!r} already; remove it first or choose another name")
        if not adapter:
            raise UserError(f"adapter {name!r} has no factors; give those of at least one module")
        for path, factors in adapter.items():
            layer = self.layers[path]
            if (factors.in_features, factors.out_features) != (layer.in_features, layer.out_features):
                raise UserError(
                    f"adapter {name!r} maps {factors.in_features} to {factors.out_features} at {path}, where the "
                    f"model maps {layer.in_features} to {layer.out_features}; it belongs to another model"
                )
        for path, factors in adapter.items():
            self.layers[path].set_factors(name, factors, dropout, None if start is None else start[path])
        self._names.append(name)

    def _check_base_weight(self, folder: Path | str, path: str, weight: Tensor) -> None:
        """Refuse a weight of the base in an adapter's file that is not that of the model."""
        own = {short: module for module, short in clean_paths(list(self.layers)).items()}
        module = path if path in self.layers else own.get(path)
        found = None if module is None else self.layers[module].base.weight
        if (
            not isinstance(found, Tensor)
            or found.shape != weight.shape
            or not torch.equal(found.cpu(), weight.to(found.dtype))
        ):
            raise UserError(
                f"the adapter {folder} brings a weight of its own for {path}, which is not the model's (its "
                "vocabulary was resized or its embeddings trained); put that weight into the model first"
            )

    def _known(self, name: str) -> None:
        if name not in self._names:
            raise UserError(f"unknown adapter {name!r}; there are {listed(self._names) or 'none yet'}")

    def _check_not_merged(self, wanted: str | None) -> None:
        if self.merged is not None and self.merged != wanted:
            raise UserError(f"adapter {self.merged!r} is merged into the base; unmerge before using another")

    def _check_no_rows(self) -> None:
        if self._selection.ids is not None:
            raise UserError("rows have adapters of their own here; leave the block of rows(...) first")

    @torch.no_grad()
    def _merged_weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights with an adapter folded in, all of which can be written."""
        owners: dict[int, list[str]] = {}
        for path, module in self.model.named_modules():
            for key, parameter in module._parameters.items():
                owners.setdefault(id(parameter), []).append(f"{path}.{key}")
        merged = {}
        for path, factors in self.adapter(name).items():
            base = self.layers[path].base
            if not factors.is_finite():
                raise UserError(f"adapter {name!r} holds a NaN or an infinity at {path}; it is not merged")
            if made_weight(base):
                raise UserError(
                    f"the weight of {path} is made anew at every call (weight_norm, spectral_norm, prune or "
                    "another parametrization); make it permanent before merging"
                )
            shared = owners[id(base.weight)]
            if len(shared) > 1:
                raise UserError(
                    f"the weight of {path} serves other modules too ({listed(shared)}); it is not merged"
                )
            merged[path] = self.layers[path].adapted_weight(name)
            if not bool(merged[path].isfinite().all()):
                raise UserError(
                    f"with adapter {name!r} the weight of {path} does not fit into {merged[path].dtype}: a NaN or "
                    "an infinity would be written; it is not merged"
                )
        return merged

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
