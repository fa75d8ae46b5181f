"""A device that is not there, so that a test without a GPU shows which tensors would have been left behind on the CPU.

`FakeCuda` computes on the CPU. It keeps account of which storages are said to lie on `cuda:0`, lets tensors say so
(`tensor.device`), and refuses what PyTorch refuses on a real GPU: an operator whose tensors lie on two devices, a
generator of another device, and a NumPy view of what is not in the CPU's memory.

Why not fake tensors, a tensor subclass, or PrivateUse1: fake CUDA tensors have no values, and fail at `.to`, at random numbers and in
autograd in a CPU build, unless `absent_gpu.cpp` is loaded before PyTorch; a wrapper subclass that says `cuda` reaches device guards that
a CPU build does not have as soon as autograd runs backward; a renamed PrivateUse1 backend needs compiled kernels for every operator.
Two modes, one above autograd and one below it, see every call of both passes, and the arithmetic stays that of the CPU.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")

_aten = torch.ops.aten
# Operators that PyTorch itself carries out between devices.
_BETWEEN = {_aten.copy_.default, _aten._foreach_copy_.default, _aten._to_copy.default}
# Those that take int64 and bool indices from the CPU, beside tensors of another device.
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_GETTERS = {Tensor.device.__get__: lambda device: device, Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
            Tensor.is_cpu.__get__: lambda device: device.type == "cpu", Tensor.get_device: lambda device: device.index or 0}
_FROM_DATA = {torch.tensor, torch.as_tensor}
_VIEWS_OF_MEMORY = {Tensor.numpy, Tensor.__array__}


class DeviceMismatch(RuntimeError):
    """Tensors of two devices met in one operator."""


class FakeCuda:
    """Within the context there is one GPU; `lies_on_it(tensor)` says whether a tensor is there. Its memory is always `MEMORY`."""

    MEMORY = 12345

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}      # a weak reference keeps the address from being used again
        self._above, self._below = _Above(self), _Below(self)
        self._patches = ExitStack()

    def __enter__(self) -> FakeCuda:
        self._patches.enter_context(mock.patch.multiple(
            torch.cuda, synchronize=_done, reset_peak_memory_stats=_done, max_memory_allocated=lambda device: self.MEMORY,
            get_device_name=lambda device: "fake", is_available=lambda: True, device_count=lambda: 1,
            is_current_stream_capturing=lambda: False, current_device=lambda: 0,
            get_rng_state=lambda device: torch.get_rng_state(), set_rng_state=lambda state, device: torch.set_rng_state(state)))
        # Autocast of the GPU is that of the CPU, which computes.
        self._patches.enter_context(mock.patch.multiple(
            torch, autocast=_Autocast, is_autocast_enabled=lambda kind: _enabled("cpu"), get_autocast_dtype=lambda kind: _dtype("cpu")))
        self._above.__enter__()
        self._below.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._below.__exit__(*error)
        self._above.__exit__(*error)
        self._patches.close()

    def lies_on_it(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def device_of(self, tensor: Tensor) -> torch.device:
        return META if tensor.is_meta else CUDA if self.lies_on_it(tensor) else CPU

    def put(self, tensor: Tensor, there: bool) -> None:
        """Says where a tensor lies whose storage is new."""
        storage = StorageWeakRef(tensor.untyped_storage())
        if there:
            self._storages[storage.cdata] = storage
        else:
            self._storages.pop(storage.cdata, None)


_enabled, _dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _refuse_in_capture(what: str) -> None:
    """A copy between the CPU's memory and the GPU's waits for the GPU."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} between devices: operation not permitted when stream is capturing")


def _done(device: torch.device) -> None:
    assert device.type == "cuda"


class _Above(TorchFunctionMode):
    """What is asked of tensors, and where new ones are made: above autograd."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return _GETTERS[func](self.fake.device_of(args[0]))
        if func in _VIEWS_OF_MEMORY and self.fake.lies_on_it(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.cpu:
            return self._to(args[0], CPU)
        if func is Tensor.cuda:
            return self._to(args[0], CUDA)
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "meta":       # of a model before its weights are read
            return func(*args, **kwargs)
        target = torch.device(device)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(f"Expected a '{target.type}' device type for generator but found '{generator.device.type}'")
        if func in _FROM_DATA and target.type == "cuda":
            _refuse_in_capture("a copy")
        made = func(*args, **{**kwargs, "device": CPU})
        self.fake.put(made, target.type == "cuda")
        return made

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all of its forms: a device or another tensor leads, or a dtype alone."""
        target, rest = kwargs.pop("device", None), list(args)
        if rest and isinstance(rest[0], (str, torch.device, int)):
            target = rest.pop(0)
        elif rest and isinstance(rest[0], Tensor):
            other = rest.pop(0)
            target, rest = self.fake.device_of(other), [other.dtype, *rest]
        elif rest and rest[0] is None:
            rest.pop(0)
        here = self.fake.device_of(tensor)
        target = here if target is None else torch.device(target)
        if target.type == here.type:
            return tensor.to(*rest, **kwargs)
        _refuse_in_capture("a copy")
        kwargs["copy"] = True
        moved = tensor.to(*[x for x in rest if isinstance(x, torch.dtype)], **kwargs)
        self.fake.put(moved, target.type == "cuda")
        return moved


class _Below(TorchDispatchMode):
    """Every operator of both passes, below autograd."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((_on_one_device(func, args), kwargs)))
        there = [self.fake.lies_on_it(t) for t in tensors]
        if len(set(there)) == 2 and (func in _BETWEEN or any(t.dim() > 0 for t, on_gpu in zip(tensors, there) if not on_gpu)):
            _refuse_in_capture(str(func))
        if any(there) and func not in _BETWEEN:
            self._check(func, tensors, there)
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Generator) and value.device.type != "cuda":
                    raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
        result = func(*args, **kwargs)
        if any(there) and func not in _BETWEEN:
            for made in _tensors(result):
                if made.untyped_storage()._cdata not in {t.untyped_storage()._cdata for t in tensors}:
                    self.fake.put(made, True)
        elif func is _aten._to_copy.default:
            self.fake.put(result, there[0])
        elif not any(there):
            for made in _tensors(result):       # an address may have been used before
                self.fake.put(made, False)
        return result

    def _check(self, func: Any, tensors: list[Tensor], there: list[bool]) -> None:
        fused = func.__name__.startswith("_fused")      # steps of an optimizer, too, lie beside their parameters
        stray = [t for t, on_gpu in zip(tensors, there) if not on_gpu and (t.dim() > 0 or fused)]
        if func in _INDEXED:
            stray = [t for t in stray if t.dtype not in (torch.int64, torch.bool)]
        if stray:
            raise DeviceMismatch(f"{func}: expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                                 f"and cpu; shapes on the CPU: {[tuple(t.shape) for t in stray]}")


def _on_one_device(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without the scales of our own operators: those are numbers, which pass the dispatcher as a CPU tensor."""
    if func.namespace != "fedms_ext":
        return args
    return tuple(arg for arg, of in zip(args, func._schema.arguments) if of.name != "scale")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
