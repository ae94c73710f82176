"""Share: one basis per layer for the adapters of all tasks (Share, arXiv 2602.06043)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from varshare_rl.adapters.adapter import Adapter
from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds
from varshare_rl.transfer.share.config import BasisMethod, Merge, ShareConfig
from varshare_rl.transfer.share.delta_basis import DeltaBasis, fit_delta
from varshare_rl.transfer.share.fit import fit
from varshare_rl.transfer.share.layer_basis import Coefficients, LayerBasis

#: Everything is float32, LoRA's factors included.
BYTES_PER_NUMBER = 4
#: Between these a correction's balanced factors are ordinary numbers of float32.
SMALLEST, LARGEST = 1e-60, 1e38


@dataclass(frozen=True)
class Storage:
    """Bytes of a basis with the coefficients of ``tasks`` tasks, and of as many LoRA adapters.

    Attributes:
        tasks: number of tasks.
        shared_bytes: of the bases, needed once.
        task_bytes: of the coefficients of one task, mean over tasks.
        originals_bytes: of the adapters that are kept beside them; 0 unless asked for.
        lora_task_bytes: of one task's LoRA adapter, mean over tasks.
        trained_numbers: what a new task trains that learns coefficients alone, with a third of the largest rank
            among the tasks as columns.
    """

    tasks: int
    shared_bytes: int
    task_bytes: float
    originals_bytes: int
    lora_task_bytes: float
    trained_numbers: int

    @property
    def lora_trained_numbers(self) -> float:
        """Numbers that a new LoRA adapter trains."""
        return self.lora_task_bytes / BYTES_PER_NUMBER

    @property
    def total_bytes(self) -> float:
        """Everything that is stored: basis, all coefficients, kept originals."""
        return self.shared_bytes + self.tasks * self.task_bytes + self.originals_bytes

    @property
    def lora_bytes(self) -> float:
        """One adapter per task."""
        return self.tasks * self.lora_task_bytes

    @property
    def saving(self) -> float:
        """Factor by which everything is smaller than the adapters, the basis included."""
        return self.lora_bytes / self.total_bytes

    @property
    def saving_without_basis(self) -> float:
        """The same without the shared basis, as it is often published: a task's adapter over its coefficients."""
        return self.lora_task_bytes / self.task_bytes

    @property
    def break_even_tasks(self) -> int | None:
        """Number of tasks from which on basis and coefficients take less than the adapters; None: never.

        The least ``N`` with ``shared + N * task < N * lora``. Kept originals are left out: with them it is never.
        """
        gain = self.lora_task_bytes - self.task_bytes
        return math.floor(self.shared_bytes / gain) + 1 if gain > 0 else None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return all of it by name."""
        derived = [name for name, value in vars(Storage).items() if isinstance(value, property)]
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class Share:
    """Bases and coefficients of all tasks. Every change gives a new one.

    Attributes:
        config: how it merges.
        tasks: names, in order.
        layers: by module path; all of them :class:`DeltaBasis` with ``method=delta``, else :class:`LayerBasis`.
        lora_numbers: how many numbers each task's LoRA adapter has.
        originals: the adapters by task, if they are kept.
        merges: how often a basis was decomposed.
    """

    config: ShareConfig
    tasks: tuple[str, ...]
    layers: Mapping[str, LayerBasis | DeltaBasis]
    lora_numbers: tuple[int, ...]
    originals: Mapping[str, Adapter] = field(default_factory=dict)
    merges: int = 1

    def index(self, task: str) -> int:
        """Return the position of a task.

        Raises:
            UserError: there is none of this name.
        """
        if task not in self.tasks:
            shown = ", ".join(self.tasks[:20]) + (", ..." if len(self.tasks) > 20 else "")
            raise UserError(f"unknown task {task!r}: this basis has {len(self.tasks)} tasks ({shown})")
        return self.tasks.index(task)

    def rebuild(self, task: str) -> Adapter:
        """Return a task's adapter, from its coefficients."""
        index = self.index(task)
        return {name: layer.rebuild(index) for name, layer in self.layers.items()}

    def errors(self) -> dict[str, dict[str, float]]:
        """Return errors ``||dW - rebuilt|| / ||dW||``, or bounds (:class:`LayerBasis`), by layer and task."""
        return {name: dict(zip(self.tasks, layer.errors, strict=True)) for name, layer in self.layers.items()}

    def storage(self) -> Storage:
        """Return the bytes that are stored, beside those of one adapter per task."""
        count = len(self.tasks)
        own = sum(layer.task_numbers(index) for layer in self.layers.values() for index in range(count))
        kept = sum(adapter_numbers(adapter) for adapter in self.originals.values())
        return Storage(
            tasks=count,
            shared_bytes=BYTES_PER_NUMBER * sum(layer.shared_numbers() for layer in self.layers.values()),
            task_bytes=BYTES_PER_NUMBER * own / count,
            originals_bytes=BYTES_PER_NUMBER * kept,
            lora_task_bytes=BYTES_PER_NUMBER * sum(self.lora_numbers) / count,
            trained_numbers=sum(layer.trained_numbers() for layer in self.layers.values()),
        )


def consolidate(adapters: Mapping[str, Adapter], config: ShareConfig) -> Share:
    """Make a basis from the adapters of some tasks.

    Args:
        adapters: by task, for the same modules with the same shapes; ranks and scales may differ.
        config: how.

    Raises:
        UserError: there is no adapter, they do not fit each other, or the options cannot be.
    """
    check_bounds(config)
    if not adapters:
        raise UserError("there are no adapters to consolidate; give at least one")
    _check_fit(_shapes(next(iter(adapters.values()))), adapters)
    return _merged(None, adapters, config)


def add(share: Share, adapters: Mapping[str, Adapter], when: Merge = Merge.needed) -> Share:
    """Add tasks: :func:`project` them where that is good enough, otherwise :func:`merge` them.

    A projection leaves earlier tasks exactly as they are, so with ``max_error`` nothing drifts until an adapter
    comes that the basis does not serve.

    Raises:
        UserError: a task is there already, or an adapter does not fit.
    """
    if when is Merge.always:
        return merge(share, adapters)
    projected = project(share, adapters)
    bound = share.config.size().max_error
    worst = max(error for layer in projected.layers.values() for error in layer.errors[len(share.tasks) :])
    enough = bound is not None and worst <= bound
    return projected if when is Merge.never or enough else merge(share, adapters)


def merge(share: Share, adapters: Mapping[str, Adapter]) -> Share:
    """Add tasks and decompose again: another basis, and all tasks' coefficients in it.

    Earlier tasks enter as they are rebuilt, or as their originals where those are kept.

    Raises:
        UserError: a task is there already, or an adapter does not fit.
    """
    _check_new(share, adapters)
    if share.config.keep_originals:
        whole = _merged(None, {**share.originals, **adapters}, share.config)
        return replace(whole, merges=share.merges + 1)
    return _merged(share, adapters, share.config)


def project(share: Share, adapters: Mapping[str, Adapter]) -> Share:
    """Add tasks without touching the basis: only their coefficients are computed.

    Raises:
        UserError: a task is there already, or an adapter does not fit.
    """
    _check_new(share, adapters)
    layers = dict(share.layers)
    for adapter in adapters.values():
        for name, layer in layers.items():
            layers[name] = layer.with_projected(adapter[name], share.config)
    return replace(
        share,
        tasks=(*share.tasks, *adapters),
        layers=layers,
        lora_numbers=(*share.lora_numbers, *map(adapter_numbers, adapters.values())),
        originals={**share.originals, **_kept(adapters)} if share.config.keep_originals else {},
    )


def put_coefficients(share: Share, task: str, own: Mapping[str, Coefficients]) -> Share:
    """Give a task the coefficients that were learnt in this basis: a new task, or one that was fine-tuned.

    From now on the task is measured against these coefficients, with an error of 0.

    Raises:
        UserError: ``method=delta``, which has no such coefficients; or a posterior and ``keep_originals``.
        ValueError: ``own`` does not have the basis's layers.
    """
    if set(own) != set(share.layers):
        raise ValueError(f"coefficients of {sorted(own)} do not fit a basis of {sorted(share.layers)}")
    if share.config.keep_originals and any(part.std_B is not None for part in own.values()):
        raise UserError(
            "the coefficients have a posterior, which keep_originals=true cannot carry: it makes them anew at "
            "every merge; consolidate with keep_originals=false"
        )
    known = task in share.tasks
    layers: dict[str, LayerBasis | DeltaBasis] = {}
    for name, layer in share.layers.items():
        if isinstance(layer, DeltaBasis):
            raise UserError("coefficients are learnt in the bases of method=share or paper, not in those of delta")
        fresh = layer if known else layer.with_task(own[name], 0.0, 0.0)
        layers[name] = fresh.with_coefficients(share.index(task) if known else len(share.tasks), own[name])
    changed = replace(share, layers=layers)
    if not known:
        numbers = sum(own[name].eps_B.shape[1] * sum(layer.features) for name, layer in layers.items())
        changed = replace(changed, tasks=(*share.tasks, task), lora_numbers=(*share.lora_numbers, numbers))
    if share.config.keep_originals:
        changed = replace(changed, originals={**share.originals, task: changed.rebuild(task)})
    return changed


def adapter_numbers(adapter: Adapter) -> int:
    """Count the numbers of an adapter's factors, ``sum of r (in + out)``."""
    return sum(factors.a.numel() + factors.b.numel() for factors in adapter.values())


def _kept(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    return {
        task: {name: factors.folded() for name, factors in adapter.items()} for task, adapter in adapters.items()
    }


def _merged(past: Share | None, adapters: Mapping[str, Adapter], config: ShareConfig) -> Share:
    tasks = (*(past.tasks if past else ()), *adapters)
    fit_layer: Any = fit_delta if config.method is BasisMethod.delta else fit
    layers: dict[str, LayerBasis | DeltaBasis] = {}
    for name in next(iter(adapters.values())) if past is None else past.layers:
        new = [adapter[name] for adapter in adapters.values()]
        try:
            layers[name] = fit_layer(None if past is None else past.layers[name], new, config, tasks)
        except UserError as error:
            raise UserError(f"layer {name}: {error}") from error
    return Share(
        config,
        tasks,
        layers,
        (*(past.lora_numbers if past else ()), *map(adapter_numbers, adapters.values())),
        _kept(adapters) if config.keep_originals else {},
        1 if past is None else past.merges + 1,
    )


Shapes = dict[str, tuple[int, int]]


def _shapes(adapter: Adapter) -> Shapes:
    return {name: (factors.out_features, factors.in_features) for name, factors in adapter.items()}


def _check_new(share: Share, adapters: Mapping[str, Adapter]) -> None:
    if not adapters:
        raise UserError("there is no adapter to add; give at least one")
    for task in adapters:
        if task in share.tasks:
            raise UserError(f"task {task!r} is in the basis already; give the adapter another name")
    _check_fit({name: layer.features for name, layer in share.layers.items()}, adapters)


def _check_fit(shapes: Shapes, adapters: Mapping[str, Adapter]) -> None:
    for task, adapter in adapters.items():
        given = _shapes(adapter)
        for name in [*shapes, *given]:
            if shapes.get(name) != given.get(name):
                raise UserError(
                    f"adapter {task!r} has {_shape(given.get(name))} for module {name}, where the others have "
                    f"{_shape(shapes.get(name))}; adapters of one basis adapt the same modules of the same model"
                )
        for name, factors in adapter.items():
            if not factors.is_finite():
                raise UserError(f"adapter {task!r} has a NaN or an infinity in module {name}; train it again")
            size = abs(factors.scale) * float(factors.a.double().norm()) * float(factors.b.double().norm())
            if size and not SMALLEST < size < LARGEST:
                raise UserError(
                    f"adapter {task!r} has a correction of size {size:.1g} in module {name}, which float32 cannot "
                    "hold; leave it out or rescale it"
                )


def _shape(shape: tuple[int, int] | None) -> str:
    return "nothing" if shape is None else f"a weight of {shape[0]} x {shape[1]}"
