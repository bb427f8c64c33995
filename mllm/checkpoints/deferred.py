"""Lets a model be loaded, merged and renamed while its weights stay in files; each is computed when it is written.

Knows tensors and the operations of torch. Does not know files, models or names of weights.

    with DeferredWeights() as weights:
        model = load(...)                   its weights are stand-ins of one number each
        merge_adapters(model)               sums with stand-ins are stand-ins too
    weights.compute(model.lm_head.weight)   reads, converts and adds, here and now

A stand-in has the shape, dtype and device of what it stands for, and takes no memory. What becomes of it is written
down and not computed, so a weight is made in the end by the very operations, in their order and dtypes, that make it in
a model in memory: by those of transformers that put experts together, and by those of PEFT that merge a LoRA.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_aten = torch.ops.aten
# These give the same numbers at the same address, so a stand-in goes through them as it is.
_SAME = {_aten.detach.default, _aten.alias.default}
# One number can be seen in any shape, and so torch takes a view of a stand-in where the tensor itself has to be copied.
_ON_VALUES: dict[Any, Any] = dict.fromkeys((_aten.view.default, _aten._unsafe_view.default), _aten.reshape.default)


@dataclass(frozen=True)
class _Recipe:
    """Says how a tensor is made.

    Args:
        stand_in: what stands for it, kept so that no other tensor gets its address.
        make: makes it, in memory that nothing else uses.
    """

    stand_in: Tensor
    make: Callable[[], Tensor]


class DeferredWeights(TorchDispatchMode):
    """Writes down, inside its `with` block, what is done to weights that stay in their files.

    The block may be entered again. Outside it stand-ins are for passing on alone: nothing there follows what is
    computed with them, and it would be no number (NaN).
    """

    _innermost: ClassVar[ContextVar["DeferredWeights | None"]] = ContextVar("deferred_weights", default=None)

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, _Recipe] = {}
        self._shared: set[int] = set()  # addresses of what has views, and of views
        self._latest: tuple[Any, list[Tensor]] = (None, [])
        self._tokens: list[Token[DeferredWeights | None]] = []

    @classmethod
    def current(cls) -> "DeferredWeights | None":
        """Return those of the block that this code runs in; None outside."""
        return cls._innermost.get()

    def __enter__(self) -> "DeferredWeights":
        self._tokens.append(self._innermost.set(self))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._innermost.reset(self._tokens.pop())

    def stand_in(self, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor on the CPU that stands for another one.

        Args:
            shape, dtype: of what it stands for.
            make: makes that, each time in memory that nothing else uses.
        """
        number = math.nan if dtype.is_floating_point else 0
        one = torch.full((), number, dtype=dtype, device="cpu").expand(tuple(shape))
        self._recipes[_address(one)] = _Recipe(one, make)
        return one

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Let what is computed with tensors that are in memory wait as well, such as the product of a LoRA's two."""
        for tensor in tensors:
            self._recipes[_address(tensor)] = _Recipe(tensor, tensor.detach().clone)

    def compute(self, tensor: Tensor) -> Tensor:
        """Make what a stand-in stands for, outside the block; any other tensor is what it is."""
        assert not self._tokens
        made = self._value_of(tensor)
        assert made.shape == tensor.shape
        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _SAME or not any(self._waits(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        inputs = tree_map(self._recipe_of, (args, kwargs))
        empty_args, empty_kwargs = tree_map(_without_values, (args, kwargs))
        if "device" in empty_kwargs:
            empty_kwargs["device"] = "meta"
        outputs, structure = tree_flatten(func(*empty_args, **empty_kwargs))
        made = [
            self.stand_in(output.shape, output.dtype, partial(self._output, func, inputs, number))
            for number, output in enumerate(outputs)
        ]
        if any(returned.alias_info is not None for returned in func._schema.returns):
            seen = [leaf for leaf in tree_leaves((args, kwargs)) if self._waits(leaf)]
            self._shared |= {_address(tensor) for tensor in (*seen, *made)}
        return tree_unflatten(made, structure)

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow an operation in place: on a stand-in, or on a tensor in memory, which gets its numbers at once.

        Raises:
            NotImplementedError: one on a part of a weight, or on a weight of which a part was taken.
        """
        target = args[0]
        if not self._waits(target):
            args, kwargs = tree_map(self._value_of, (args, kwargs))
            return func(*args, **kwargs)
        written = func._schema.arguments[0].alias_info
        if written is None or not written.is_write or _address(target) in self._shared:
            raise NotImplementedError(f"{func} writes to a part of a weight that is still in its file")
        if func is _aten.copy_.default and args[1].shape == target.shape:  # without reading what was there
            make = partial(_copy, self._recipe_of(args[1]), target.dtype)
        else:
            make = partial(self._output, func, tree_map(self._recipe_of, (args, kwargs)), 0)
        self._recipes[_address(target)] = _Recipe(target, make)
        return target

    def _output(self, func: Any, inputs: Any, number: int) -> Tensor:
        """Compute an operation, and return the one of its outputs that is asked for."""
        if self._latest[0] is inputs:
            return self._latest[1][number]
        self._latest = (None, [])
        args, kwargs = tree_map(_made, inputs)
        outputs = tree_leaves(_ON_VALUES.get(func, func)(*args, **kwargs))
        if len(outputs) > 1:  # pieces of one tensor, such as experts, are asked for one after the other
            self._latest = (inputs, outputs)
        return outputs[number]

    def _waits(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _address(value) in self._recipes

    def _recipe_of(self, value: Any) -> Any:
        return self._recipes[_address(value)] if self._waits(value) else value

    def _value_of(self, value: Any) -> Any:
        return _made(self._recipe_of(value))


def _address(tensor: Tensor) -> int:
    """Return where the numbers of a tensor begin in memory; 0 for one without values."""
    return tensor.untyped_storage().data_ptr()


def _without_values(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _made(value: Any) -> Any:
    return value.make() if isinstance(value, _Recipe) else value


def _copy(source: Any, dtype: torch.dtype) -> Tensor:
    return _made(source).to(dtype, copy=True)
