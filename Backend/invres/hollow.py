"""Tensors with a shape, a type and a storage of the right size, but without values: what runs on them takes no memory.

They do what torch's own FakeTensorMode does, for an ordinary step of eager code on the CPU only, in a fraction of its
time: memory is predicted by running whole training steps on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import InvresError

__all__ = ["HollowTensors", "run_without_values", "without_values"]

T = TypeVar("T")

_ASKS_DEVICE = torch.ops.prim.device.default
_CPU, _META = torch.device("cpu"), torch.device("meta")
_RESULTS: dict[Any, Any] = {}  # shapes that operators have given for shapes
_MOST_RESULTS = 5_000  # of 2 kB; a prediction for another patch adds some hundreds
_ACTIVE: ContextVar[HollowTensors | None] = ContextVar("active", default=None)


class HollowTensors(TorchDispatchMode):
    """Context in which new tensors are hollow. They say that they are on the CPU: autocast does what it does there.

    Tensors from outside keep their values, and what is made of them alone is computed. Reading a value of a hollow
    tensor, or changing its shape in place, raises NotImplementedError.
    watchers: called with each operator and what it has given. A mode of their own would see the same, but asking torch
        for a second mode takes about as long as all that happens here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watchers: list[Callable[[Any, Any], None]] = []

    def __enter__(self) -> HollowTensors:
        if len(_RESULTS) > _MOST_RESULTS:
            _RESULTS.clear()
        self._before = _ACTIVE.set(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _ACTIVE.reset(self._before)

    @staticmethod
    def active() -> HollowTensors | None:
        """The context that this is in."""
        return _ACTIVE.get()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch switches its compiler off and on again at every operator, which takes longer than the operator.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ASKS_DEVICE:
            return _CPU
        result = _run(func, args, kwargs or {})
        for watch in self.watchers:
            watch(func, result)
        return result


def without_values() -> AbstractContextManager[Any]:
    """A context in which new tensors have no values: `HollowTensors`, or torch's own where this torch lacks what they
    are made of."""
    if _hollow_works():
        return HollowTensors()
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    return FakeTensorMode()


def run_without_values(work: Callable[[], T]) -> T:
    """What `work` gives inside `without_values`; where hollow tensors cannot do something in it, on torch's own."""
    if _hollow_works():
        try:
            with HollowTensors():
                return work()
        except InvresError:
            raise
        except Exception:  # a prediction must not end a training; what else is wrong, the second attempt says too
            pass
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return work()


@functools.cache
def _hollow_works() -> bool:
    """Tried out, because they are made of private functions of torch, which other versions may have changed."""
    try:
        with torch.enable_grad(), HollowTensors():
            one = torch.zeros(2, 3, requires_grad=True)
            layer = torch.nn.Linear(3, 2)
            layer(one).relu_().sum().backward()
            emptied = torch.zeros(4)
            emptied.untyped_storage().resize_(0)
            layer.weight.data = torch.zeros(2, 3)
            return one.grad is not None and tuple(one.grad.shape) == (2, 3)
    except Exception:  # whatever it is, the other way is open
        return False


class _Hollow(torch.Tensor):
    """A tensor that says it is on the CPU, over the storage of `on_meta`, which is one on the meta device."""

    on_meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, on_meta: torch.Tensor) -> _Hollow:
        made = torch.Tensor._make_subclass(cls, on_meta, False, dispatch_device=True, device_for_backend_keys=_CPU)
        made.on_meta = on_meta
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Nature(NamedTuple):
    """Of an operator: whether it changes but the values of its first argument, puts another storage or shape into it,
    gives fresh tensors only, and can make a tensor from none.
    """

    changes_values: bool
    changes_layout: bool
    gives_fresh: bool
    creates: bool


@functools.cache
def _nature(func: Any) -> _Nature:
    taken, given = func._schema.arguments, func._schema.returns
    aliased = [i for i, a in enumerate((*taken, *given)) if a.alias_info is not None]
    written = [i for i, a in enumerate((*taken, *given)) if a.alias_info is not None and a.alias_info.is_write]
    layout = torch.Tag.inplace_view in func.tags
    in_place = written == aliased == [0, len(taken)] and len(given) == 1
    return _Nature(in_place and not layout, layout, not aliased, any(a.name == "device" for a in taken))


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs) in shapes only, unless all of its tensors have values."""
    if func is _ASKS_DEVICE:
        return _CPU
    nature = _nature(func)
    if nature.changes_values and isinstance(args[0], _Hollow):
        return args[0]
    hollow: dict[int, _Hollow] = {}
    values: list[torch.Tensor] = []
    given = [_inner(value, hollow, values) for value in args]
    named = {name: _inner(value, hollow, values) for name, value in kwargs.items()}
    if not hollow and (values or not nature.creates):
        return func(*args, **kwargs)
    if values:
        given = [_on_meta(value) for value in given]
        named = {name: _on_meta(value) for name, value in named.items()}
    if not hollow or named.get("device") is not None:
        named["device"] = _META
    key = None
    if nature.gives_fresh:
        key = func, torch.get_default_dtype(), _described(given), _described(list(named.items()))
        if (known := _RESULTS.get(key)) is not None:
            one, layouts = known
            made = [x if x is None else _Hollow(torch.empty_strided(*x[:2], dtype=x[2], device=_META)) for x in layouts]
            return made[0] if one else tuple(made)
    found = func(*given, **named)
    if nature.changes_layout:
        return _relaid(args[0])
    one = not isinstance(found, (list, tuple))
    several = [found] if one else found
    if key is not None and _are_fresh(several, hollow):
        _RESULTS[key] = one, [None if x is None else (x.size(), x.stride(), x.dtype) for x in several]
    outer = [
        x if not isinstance(x, torch.Tensor) else hollow[id(x)] if id(x) in hollow else _Hollow(x) for x in several
    ]
    return outer[0] if one else type(found)(outer)


# Functions of their own: one inside another that calls itself would keep its tensors until garbage is collected.
def _inner(value: Any, hollow: dict[int, _Hollow], values: list[torch.Tensor]) -> Any:
    """An argument with hollow tensors replaced by what is in them; notes these, and tensors with values."""
    if isinstance(value, _Hollow):
        hollow[id(value.on_meta)] = value
        return value.on_meta
    if isinstance(value, torch.Tensor):
        values.append(value)
    elif isinstance(value, (list, tuple)):
        return [_inner(v, hollow, values) for v in value]
    return value


def _are_fresh(results: Sequence[Any], hollow: dict[int, _Hollow]) -> bool:
    """True for tensors that share no storage with the arguments: `_unsafe_view` does so without saying it."""
    storages = {tensor.untyped_storage()._cdata for tensor in hollow.values()}
    return all(
        x is None or (isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in storages) for x in results
    )


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(_META)
    return [_on_meta(v) for v in value] if isinstance(value, list) else value


def _described(value: Any) -> Any:
    """All of an argument that the shape and the type of a result may depend on, hashable."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_described(v) for v in value)
    return type(value), value


def _relaid(tensor: _Hollow) -> _Hollow:
    """The tensor over the storage that its tensor on the meta device has got."""
    if tensor.on_meta.size() != tensor.size() or tensor.on_meta.stride() != tensor.stride():
        raise NotImplementedError("A hollow tensor cannot change its shape in place.")
    torch._functionalize_unsafe_set(tensor, tensor.on_meta)
    return tensor
