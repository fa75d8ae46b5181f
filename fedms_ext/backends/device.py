"""The GPU that the kernels run on: what it is, its stream, and whether this build has passed its tests on it.

Two stand-ins let the tests run the kernels without a GPU, on tensors of the CPU: TRITON_INTERPRET=1 makes Triton interpret its
kernels, and FEDMS_CUDA_EMULATED=FILE takes the CUDA kernels from a module that was compiled for the emulator of
tests/kernels/cuda. No other module of this folder knows of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from .. import _C
from . import files

_EMULATOR = os.environ.get("FEDMS_CUDA_EMULATED")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class DeviceProperties(NamedTuple):
    """The properties of a GPU that the kernels need.

    Attributes:
        capability: Compute capability, (major, minor).
        multiprocessors: Number of multiprocessors.
        shared_memory: Bytes of shared memory that a block of threads may use.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


_STAND_IN = DeviceProperties((9, 0), multiprocessors=4, shared_memory=232448)

# The attribute of a tensor that tells whether it is on a device of the CUDA kernels. Each call of a layer reads it with `getattr`,
# which costs no Python call; torch.compile cannot trace an `operator.attrgetter`.
ON_GPU = "is_cpu" if _EMULATOR else "is_cuda"


def runs_cuda(device: torch.device) -> bool:
    """Return whether the CUDA kernels take tensors of a device."""
    return device.type == ("cpu" if _EMULATOR else "cuda")


def runs_triton(device: torch.device) -> bool:
    """Return whether the Triton kernels take tensors of a device."""
    return device.type == ("cpu" if _INTERPRETED else "cuda")


def unfit_input(x: torch.Tensor, takes_device: bool) -> str | None:
    """Return why the GPU kernels cannot compute a call with this input, or None.

    Args:
        x: The call's input.
        takes_device: Whether the kernels take tensors of its device, see `runs_cuda` and `runs_triton`.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or not takes_device:
        return f"it takes bf16 and fp16 on a CUDA GPU, but its input is {x.dtype} on {x.device}"
    if properties(x.device).capability < (8, 0):
        return "it needs compute capability 8.0 or higher"
    return None


def is_real(device: torch.device) -> bool:
    """Return whether a device is a GPU and not a stand-in: only there can anything be measured."""
    return device.type == "cuda"


def no_gpu() -> str | None:
    """Return why PyTorch has no CUDA GPU here, or None if it has one."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU; see torch.cuda.is_available()"
    return None


def no_triton() -> str | None:
    """Return why Triton's kernels cannot run here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if _INTERPRETED:
        return None
    if reason := no_gpu():
        return reason
    version = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"Triton {version} is too old; 3.6 or newer is needed, which comes with PyTorch 2.10"
    return None


def no_cuda_kernels() -> str | None:
    """Return why the CUDA kernels cannot run here, or None if they can."""
    kernels = cuda_kernels()
    if kernels is None:
        return "this build has no CUDA kernels; reinstall with FEDMS_CUDA=1 and the CUDA toolkit (nvcc)"
    if _EMULATOR:
        return None
    if reason := no_gpu():
        return reason
    try:
        kernels.check_device(torch.cuda.current_device())
    except RuntimeError as error:
        return f"{error}; this build is for {_C.build_info()['cuda']}, see FEDMS_CUDA_ARCHS in setup.py"
    return None


@lru_cache(maxsize=1)
def cuda_kernels() -> ModuleType | None:
    """Return the module of the CUDA kernels, or None if this build has none."""
    if not _EMULATOR:
        return getattr(_C, "cuda", None)
    spec = importlib.util.spec_from_file_location("_C", _EMULATOR)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    module.set_tensor_types(torch.Tensor, torch.nn.Parameter)
    return module.cuda


@lru_cache(maxsize=None)
def properties(device: torch.device) -> DeviceProperties:
    """Return what the kernels must know of a device."""
    if not is_real(device):
        return _STAND_IN
    found = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        (found.major, found.minor),
        found.multi_processor_count,
        found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stubs
    )


def current() -> torch.device:
    """Return the device that PyTorch's CUDA calls go to now, or the stand-in."""
    return torch.device("cpu") if _EMULATOR else torch.device("cuda", torch.cuda.current_device())


_NOTHING: AbstractContextManager[None] = nullcontext()


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one. Triton launches on the current device, whatever its tensors are."""
    if not is_real(device) or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream of a device captures a CUDA graph."""
    if not is_real(device):
        return False
    with guard(device):
        return torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=1)
def build_id() -> str:
    """Return the hash of the module that holds the CUDA kernels: another build may do other things."""
    return hashlib.sha256(Path(_EMULATOR or _C.__file__).read_bytes()).hexdigest()


def record_of(capability: tuple[int, int]) -> Path:
    """Return the file that says which build's CUDA kernels passed their tests on a GPU of that capability."""
    return files.folder() / f"cuda-sm{capability[0]}{capability[1]}-passed.json"


@lru_cache(maxsize=None)
def has_passed(capability: tuple[int, int]) -> bool:
    """Return whether this build's CUDA kernels passed their tests on a GPU of that capability, as $FEDMS_CACHE says."""
    record = files.read(record_of(capability))
    return bool(record) and record.get("build") == build_id()


def record_pass() -> Path:
    """Note in $FEDMS_CACHE that this build's CUDA kernels passed their tests on the current GPU, and return the file.

    Only for whoever ran these tests just now.
    """
    path = record_of(properties(current()).capability)
    files.write(path, {"build": build_id(), "passed": time.strftime("%Y-%m-%d %H:%M:%S")})
    has_passed.cache_clear()
    return path
