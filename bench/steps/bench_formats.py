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

FORMATS = ("fp32", "int8", "int8_rotated")


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
    models = {frozen: attached(frozen) for frozen in FORMATS}
    compare({f"{frozen}: pass without a gradient": prefix_pass(model, ids) for frozen, model in models.items()}, asked.repeats)
    for depth in (4, BLOCKS):
        compare({f"{frozen}: step at depth {depth}": own_step(model, ids, depth, 1.0) for frozen, model in models.items()},
                asked.repeats)


if __name__ == "__main__":
    main()
