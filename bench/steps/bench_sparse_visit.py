"""What a client's whole visit costs with Sparsely Activated LoRA, beside PEFT on all blocks.

    make bench        or        pytest -q -s -o addopts= -o python_files='bench_*.py' bench/steps/bench_sparse_visit.py

A visit (`bench/cases.py`: the models and batches) judges the model it received on one batch and trains three local epochs
over three batches, of the ViT over two batches of two images, by the trainer's own steps. "first": nothing is known of the
client's samples, so the constant prefix is run and stored on the way (in stage 2 also the global expert's logits and the
gate's features). "later": they are there. PEFT does the same work from the input every time. Figures say how often faster
than PEFT, turn by turn: the median and, in brackets, the 20th and 80th percentile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from bench.cases import CLASSES, MINILM, RANK, VIT_B, Case, Step
from bench.harness.timing import interleaved, ratio, summarize
from torch import Tensor

import fedms_ext

pytest.importorskip("fedms.config")
from fedms import methods  # noqa: E402
from fedms.config import load_config  # noqa: E402
from fedms.data import ClientSplit  # noqa: E402
from fedms.data.dataset import make_dataset  # noqa: E402
from fedms.data.inputs import ImageInputs, TextInputs  # noqa: E402
from fedms.federated.client import Client, Message, Private  # noqa: E402
from fedms.models.base import FoundationModel  # noqa: E402
from fedms.training.constants import new_cache  # noqa: E402


EPOCHS = 3
PEFT = "PEFT, all blocks"


class Foundation(FoundationModel):
    reads = "images"

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.module(**inputs).last_hidden_state.mean(1)


class Visit:
    """A visit of stage 1 or 2 of method `fedms`; a call makes it, with what the client's cache holds, or without."""

    def __init__(self, case: Case, batches: int, frozen: str, stage: str, *, first: bool) -> None:
        config = load_config("digits", [f"lora.rank={RANK}", f"model.frozen={frozen}", f"stage1.batch={case.samples}",
                                        f"stage2.batch={case.samples}", f"stage1.epochs={EPOCHS}",
                                        f"stage2.epochs={EPOCHS}", f"run.threads={torch.get_num_threads()}"])
        samples = (batches + 1) * case.samples
        made = [case.batch() for _ in range(batches + 1)]
        if case is MINILM:
            tokens = torch.cat([batch["input_ids"] for batch in made])
            inputs = TextInputs({"input_ids": tokens.flatten()}, torch.arange(samples + 1) * case.tokens, {"input_ids": 0})
        else:
            inputs = ImageInputs(torch.cat([batch["pixel_values"] for batch in made]), case.tokens, case.name)
        dataset = make_dataset(case.name, inputs, torch.arange(samples) % CLASSES, ("a", "b"))
        foundation = Foundation(case.name, case.module(), case.width)
        self.model = ExpertModel(foundation, dataset, config)
        self.method, self.first = methods.create(config), first
        rows = torch.arange(samples)
        split = ClientSplit(0, None, rows[case.samples:], rows[:case.samples], rows[:0])
        self.client = Client(split, config)
        message = Message("stage1", 1, (0,), case.trained, case.trained, self.model.initial(0))
        self.message = message if stage == "stage1" else replace(
            message, stage="stage2", constants=message.tensors)

    def __call__(self) -> None:
        if self.first:
            self.model.cache = new_cache(self.model)
        self.model.forget_opinions()        # the received expert is judged at each visit
        self.model.clear()
        self.method.client_step(self.model, self.client, Private(), self.message)


class PeftVisit:
    """The same work by PEFT on all blocks."""

    def __init__(self, case: Case, batches: int) -> None:
        model = case.theirs(case.blocks)
        self.batches = [Step(case, model, case.batch()) for _ in range(batches + 1)]
        for step in self.batches:       # one head and one optimizer
            step.head, step.optimizer = self.batches[0].head, self.batches[0].optimizer

    def __call__(self) -> None:
        judged, *trained = self.batches
        with torch.no_grad():
            judged.head(judged.hidden().mean(1))
        for _ in range(EPOCHS):
            for step in trained:
                step()


@pytest.mark.parametrize("case, batches", [(MINILM, 3), (replace(VIT_B, samples=2), 2)], ids=["MiniLM", "ViT-B"])
def test_visit(benchmark, case, batches):
    visits: dict[str, Callable[[], None]] = {PEFT: PeftVisit(case, batches)}
    for frozen in ("fp32", "int8"):
        for name, stage, first in (("stage 1, first", "stage1", True), ("stage 1, later", "stage1", False),
                                   ("stage 2, first", "stage2", True), ("stage 2, later", "stage2", False)):
            visits[f"{frozen}, {name}"] = Visit(case, batches, frozen, stage, first=first)
    seconds = interleaved(visits, seconds=60.0, least_turns=3)
    print(f"\n\n{case.name}: {batches} batches of {case.samples} x {case.tokens} tokens, {EPOCHS} epochs, ", end="")
    print(f"{case.trained} of {case.blocks} blocks, {fedms_ext.build_info()['isa_used']}, {torch.get_num_threads()} ", end="")
    print(f"threads, torch {torch.__version__}, {len(seconds[PEFT])} turns")
    print("| | s | over PEFT, all blocks | its time over stage 1's |")
    print("| --- | ---: | ---: | ---: |")
    for name in visits:
        over = ratio(seconds[PEFT], seconds[name])
        stages = ratio(seconds[name], seconds[name.replace("stage 2", "stage 1")])
        benchmark.extra_info[name] = {"seconds": asdict(summarize(seconds[name])), "over_peft": asdict(over)}
        print(f"| {name} | {summarize(seconds[name]).median:.2f} | {over} | {stages if 'stage 2' in name else ''} |")
    benchmark.pedantic(visits["fp32, stage 1, later"], rounds=2)
