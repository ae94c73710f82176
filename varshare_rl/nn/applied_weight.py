"""The weight of a layer that never builds it, for modules that read it without calling the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

#: What is asked of a weight without its values.
_KIND = frozenset(
    [getattr(Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "layout", "is_cuda")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size]
)


class AppliedWeight(Tensor):
    """Stand-in for the weight ``[out, in]`` that a layer applies, built at the first use of its values.

    Its kind (type, shape, device) is that of the base weight and costs nothing. PyTorch's fused kernels leave
    tensors of another class alone, so a module that would read the bare weight calls the layer instead.
    """

    _alike: Tensor
    _build: Callable[[], Tensor]

    @classmethod
    def of(cls, base: Tensor, build: Callable[[], Tensor]) -> AppliedWeight:
        """Make the stand-in from the base weight and a function that gives the weight in full."""
        made = base.detach().as_subclass(cls)
        made._alike, made._build = base, build
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if not isinstance(value, AppliedWeight):
                return value
            own = vars(value)
            return own["_alike"] if func in _KIND else own["_build"]()

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
