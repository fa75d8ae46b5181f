"""The device that a model computes on: which one a run file means, whether its kernels compute right, and its clock and
memory."""
from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fedms.errors import ConfigError
from fedms.training.memory import peak_memory, reset_peak_memory
from fedms_ext import backends, reference
from fedms_ext.operators.expert_linear import expert_linear

# Largest difference from the float64 reference that a device's float32 may show, as a share of the largest value: what
# TF32 loses, which keeps 10 bits of a factor.
TOLERANCE = 4e-3
QUANTIZED = ("int8", "int8_rotated", "nf4", "int4")
ACTIVATIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """The chosen device.

    Attributes:
        device: The device.
        notes: Which GPU it is, and why other GPUs are not used; empty on a machine without a GPU.
    """

    device: torch.device
    notes: tuple[str, ...] = ()


def choose(asked: str, frozen: str = "fp32") -> Choice:
    """Choose the device for `[run] device`.

    Args:
        asked: "cpu", "cuda" (the first GPU), "cuda:N", "mps", or "auto": the first CUDA GPU that passes the self-check with
            this format of frozen weights, otherwise the CPU.
        frozen: `[model] frozen`, the format of the frozen weights.

    Raises:
        ConfigError: If a device was named that does not exist or fails the self-check; the message gives an alternative.
    """
    if asked == "cpu":
        return Choice(torch.device("cpu"))
    if asked == "auto":
        notes: list[str] = []
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            device = torch.device("cuda", number)
            if (reason := obstacle(device, frozen)) is None:
                return Choice(_prepared(device), (*notes, f"computed on {describe(device)}"))
            notes.append(f"{describe(device)} is not used: {reason}")
        return Choice(torch.device("cpu"), tuple(notes))
    device = torch.device("cuda", 0) if asked == "cuda" else torch.device(asked)
    if (reason := _absent(device) or obstacle(device, frozen)) is not None:
        raise ConfigError(f'run.device: got {asked!r}, but {reason}; use "cpu", or "auto" for the best device that works')
    return Choice(_prepared(device), (f"computed on {describe(device)}",))


def _absent(device: torch.device) -> str | None:
    if device.type == "mps":
        return None if torch.backends.mps.is_available() else "torch sees no GPU of Apple's here"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU here"
    count = torch.cuda.device_count()
    return None if device.index < count else f"there are {count} CUDA GPUs, numbered from 0"


def obstacle(device: torch.device, frozen: str = "fp32") -> str | None:
    """Return why an existing GPU cannot compute with frozen weights of this format, or None if it can."""
    if frozen in QUANTIZED and (device.type != "cuda" or backends.explain("triton") is not None):
        why = "on CUDA GPUs alone" if device.type != "cuda" else f"by Triton: {backends.explain('triton')}"
        return f'model.frozen = "{frozen}" is computed there {why}; "bf16" and "fp32" work'
    return self_check(device)


def format_on(device: torch.device, frozen: str) -> str:
    """Return the format in which a device stores frozen weights: int8 instead of int8_rotated on a GPU, which does not round
    activations. So one run file is for both."""
    return "int8" if frozen == "int8_rotated" and device.type != "cpu" else frozen


def self_check(device: torch.device) -> str | None:
    """Compute a layer with two experts and its gradients on a device, and compare them with the float64 reference.

    Returns:
        None if they agree within `TOLERANCE`, otherwise a text that says what differs.
    """
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, gate = (torch.randn(shape, generator=draw) for shape in ((48, 64), (80, 64), (80,), (48, 2)))
    a = [torch.randn(rank, 64, generator=draw) for rank in (8, 5)]
    b = [torch.randn(80, rank, generator=draw) for rank in (8, 5)]
    dy = torch.randn(48, 80, generator=draw)
    try:
        found = _layer_and_gradients(expert_linear, [t.to(device) for t in (x, weight, bias, gate, *a, *b, dy)])
    except Exception as error:      # a driver, a compiler or a kernel: each has exceptions of its own
        return f"its kernels fail ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
    wanted = _layer_and_gradients(reference.expert_linear, [t.double() for t in (x, weight, bias, gate, *a, *b, dy)])
    for name, value, right in zip(("output", "dx", "dgate", "dA 0", "dA 1", "dB 0", "dB 1"), found, wanted):
        largest = float((value.cpu().double() - right).abs().max() / right.abs().max())
        if not largest <= TOLERANCE:      # not a number, too
            return f"its kernels compute {name} wrong: the largest error is {largest:.2g} of the largest value, above {TOLERANCE:g}"
    return None


def _layer_and_gradients(operator, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    x, weight, bias, gate, a0, a1, b0, b1, dy = tensors
    asked = [t.requires_grad_() for t in (x, gate, a0, a1, b0, b1)]
    y = operator(x, weight, bias, [a0, a1], [b0, b1], [2.0, 0.5], gate=gate)
    return [y.detach(), *torch.autograd.grad(y, asked, dy)]


def _prepared(device: torch.device) -> torch.device:
    """Make PyTorch choose deterministic algorithms on a device, so that the same seed gives the same bits."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def describe(device: torch.device) -> str:
    """Return a name for people: "cpu", "mps", or the number and the model name of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def one_gpu_each(*asked: str) -> list[dict[str, str]]:
    """Return, for each GPU of the machine, the environment variables with which a process sees that GPU alone.

    The list is empty with fewer than two GPUs, or if a device is named.

    Args:
        asked: Values of `[run] device` of the processes.
    """
    if any(name not in ("auto", "cuda") for name in asked):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in names] if len(names) > 1 else []


# Clock and memory

def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work, so that measured times include it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of `peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def peak(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak`.

    On a CUDA GPU it is the memory allocated by PyTorch, otherwise the resident size of the process (GPUs of Apple share the
    memory of the machine).
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
