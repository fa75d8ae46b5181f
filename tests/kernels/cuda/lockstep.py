"""Eight clients side by side on the CUDA kernels without a GPU: `python lockstep.py FOLDER`, with FEDMS_CUDA_EMULATED set.

The model has MiniLM's architecture, with few narrow layers. Its tensors are those of `fake_device.FakeCuda`, and the emulator computes
the kernels. Fails unless the visits come to what they come to one after the other. Prints as JSON how often each backend
computed a layer, for how many experts side by side.
"""
from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "fedms" / "engines")]

from fake_device import FakeCuda
from visits import IMAGES, World, agree, sentences

from fedms import models
from fedms.config import load_config
from fedms_ext import backends
from fedms_ext.backends import cuda

SETS = ["run.method=fedavg", "run.dtype=bf16", "sal.depth=1", "stage1.lr=0.05", 'model.targets=["value","attention.output.dense"]']
SIZES = (5, 2, 4, 3, 5, 1, 4, 2)


def main(folder: Path) -> None:
    chosen: Counter[str] = Counter()
    choose = backends.choose

    def counting(call):
        backend = choose(call)
        if call.lora.segments is not None:
            chosen[f"{backend.name} {type(call).__name__} of {len(call.lora.segments)}"] += 1
        return backend

    config = load_config("sentiment", [*IMAGES, *sentences(folder), *SETS])
    foundation = models.load(config.model, config.task.kind)    # on the CPU, as a run does it
    with FakeCuda(), mock.patch.object(cuda, "prefers", lambda call: True), mock.patch.object(backends, "choose", counting):
        world = World(config, SIZES, "cuda", foundation)
        agree(world.visits(config, "stage1", lockstep=True), world.visits(config, "stage1"), 1e-3)
    print(json.dumps(chosen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
