"""What a layer on the CUDA kernels costs the host: Python calls, launches, and instructions.

    FEDMS_CUDA_EMULATED=FILE FEDMS_EMULATOR=none python tests/kernels/cuda/host_cost.py [TOGGLE]

The launchers return at once, so that only the work of the host is left. Two cases show the part of PyTorch in it: "an empty module"
is called without gradients, and "an empty function" is the forward and backward pass of an autograd function that computes nothing.
"three layers" are the forward and backward pass of layers that share their input, one by one, and "a group of three" together. One
line of JSON is printed for each case. TOGGLE is a compiled callgrind_toggle.cpp: under
`valgrind --tool=callgrind --instr-atstart=no` each case then writes a profile of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import fedms_ext
from fedms_ext import ExpertLinear, LoRA

TIMES = 20


def cases() -> dict[str, Callable[[], object]]:
    """Passes of a layer so small that what a tensor's memory costs does not count: float32 experts on a bf16 weight."""

    def made() -> ExpertLinear:
        layer = ExpertLinear.from_linear(nn.Linear(16, 16, dtype=torch.bfloat16), {"only": LoRA(8, alpha=16)})
        layer.set_state("only", "trained")
        return layer

    layer, three, grouped = made(), [made() for _ in range(3)], [made() for _ in range(3)]
    fedms_ext.group(grouped)
    x = torch.randn(80, 16, dtype=torch.bfloat16)
    inputs = [x.clone().requires_grad_(), layer.lora_a["only"], layer.lora_b["only"]]
    dy = torch.randn(80, 16, dtype=torch.bfloat16)

    def forward(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    def of_all(layers: list[ExpertLinear]) -> object:
        pairs = [pair for one in layers for pair in (one.lora_a["only"], one.lora_b["only"])]
        return torch.autograd.grad([one(inputs[0]) for one in layers], [inputs[0], *pairs], [dy] * 3)

    empty = nn.Identity()
    return {
        "forward": lambda: forward(layer),
        "an empty module": lambda: forward(empty),
        "forward and backward": lambda: torch.autograd.grad(layer(inputs[0]), inputs, dy),
        "three layers": lambda: of_all(three),
        "a group of three": lambda: of_all(grouped),
        "an empty function": lambda: torch.autograd.grad(_Empty.apply((x.detach(),), *inputs), inputs, dy),
    }


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: tuple[torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.inputs = inputs
        return made[0]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.inputs


def calls_of(run: Callable[[], object]) -> int:
    """Return how many functions of Python are called."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    torch.set_num_threads(1)
    emulator = ctypes.CDLL(os.environ["FEDMS_CUDA_EMULATED"])
    emulator.fedms_launches.restype = ctypes.c_int64
    toggle = ctypes.CDLL(sys.argv[1]) if len(sys.argv) > 1 else None
    with fedms_ext.use_backend("cuda"), patch("fedms_ext.backends.fastest.fastest_of", return_value="together"):
        for name, run in cases().items():
            for _ in range(60):  # until every cache is filled, PyTorch's too
                run()
            before = emulator.fedms_launches()
            run()
            launches = emulator.fedms_launches() - before
            print(json.dumps({"case": name, "launches": launches, "calls": calls_of(run)}), flush=True)
            if toggle is not None:
                toggle.start()
                for _ in range(TIMES):
                    run()
                toggle.stop(name.encode())


if __name__ == "__main__":
    main()
