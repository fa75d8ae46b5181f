"""What the format of the frozen weights costs a language model in time: `python -m bench.steps.bench_formats`.

SmolLM2-135M: a pass of the blocks over 4 x 128 tokens, as the prefix is computed; a training step with r = 8 in the top four
blocks above a cached prefix, with a loss on all tokens; and the same step on all blocks. Seconds are those of the CPU in one
thread, taken in turns.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench.steps.bench_language import BATCH, BLOCKS, LENGTH, attached, compare, own_step
from fedms.models.smollm2 import SmolLM2

# Name, and the arguments of `attached`.
FORMATS: dict[str, tuple] = {
    "fp32": ("fp32",),
    "int8": ("int8",),
    "int8_rotated": ("int8_rotated",),
    "and v_proj and one down_proj in fp32": ("int8_rotated", ("v_proj", "layers.11.mlp.down_proj")),
}


def prefix_pass(model: SmolLM2, ids: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model.hidden({"input_ids": ids})
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(100, 49_000, (BATCH, LENGTH))
    models = {name: attached(*form) for name, form in FORMATS.items()}
    print("a pass without a gradient", flush=True)
    compare({name: prefix_pass(model, ids) for name, model in models.items()}, asked.repeats)
    for depth in (4, BLOCKS):
        print(f"a step at depth {depth}", flush=True)
        compare({name: own_step(model, ids, depth, 1.0) for name, model in models.items()}, asked.repeats)


if __name__ == "__main__":
    main()
