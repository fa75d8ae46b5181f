"""A training step of a causal language model beside PEFT's, and the speed of generation: `python -m bench.steps.bench_language`.

A step is forward, backward and AdamW on 4 x 128 tokens of SmolLM2-135M with r = 8 on all Linear layers of the blocks. PEFT
trains all 30 blocks in float32 with all logits, as transformers does; here the top blocks are trained above a cached prefix,
with int8 blocks and a loss in chunks. Seconds are those of the CPU in one thread, taken in turns, so that other work on the
machine changes them little. Memory is the peak of what tensors hold above what is there before the step.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

import fedms_ext
from fedms.models.generation import Decoder, Sampling, generate
from fedms.models.smollm2 import SmolLM2, converted
from fedms_ext.budget import PeakMemory
from fedms_ext.token_loss import mixture_log_prob, token_log_prob

BATCH, LENGTH, BLOCKS = 4, 128, 30
EXPERTS = ("global", "local")


def peft_step(ids: Tensor) -> Callable[[], None]:
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(converted(), dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return step


def attached(frozen: str, full_precision: tuple[str, ...] = ()) -> SmolLM2:
    model = SmolLM2()
    fedms_ext.attach(model.module, "all-linear", {e: fedms_ext.LoRA(8, 16) for e in EXPERTS}, blocks=model.blocks)
    for layer in fedms_ext.expert_layers(model.module).values():
        for expert in EXPERTS:
            torch.nn.init.normal_(layer.lora_b[expert], std=0.02)
    if frozen != "fp32":
        fedms_ext.quantize(model.module, frozen, exclude=full_precision or None)
        model.quantize_head(frozen)
    return model


def own_step(model: SmolLM2, ids: Tensor, depth: int, answers: float) -> Callable[[], None]:
    fedms_ext.activate(model.module, "global", depth=depth)
    fedms_ext.deactivate(model.module, "local")
    optimizer = torch.optim.AdamW([p for p in model.module.parameters() if p.requires_grad], 1e-3, fused=True)
    prefix = fedms_ext.ConstantPrefix(model.module)
    inputs = {"input_ids": ids}
    hidden0 = prefix.capture(lambda: model.hidden(inputs)) if depth < BLOCKS else None
    first = LENGTH - 1 - int(answers * (LENGTH - 1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if hidden0 is None:
            hidden = model.hidden(inputs)
        else:
            with prefix.replay(hidden0):
                hidden = model.hidden(inputs)
        wanted = ids[:, first + 1:].flatten()
        loss = -token_log_prob(hidden[:, first:-1].flatten(0, 1), model.head, wanted).log_p.mean()
        loss.backward()
        optimizer.step()
    return step


def compare(steps: dict[str, Callable[[], None]], repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory = {}
    for name, step in steps.items():
        step()
        with PeakMemory() as peak:
            step()
        memory[name] = peak.peak
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    first = next(iter(steps))
    for name in steps:
        print(f"{name:44} {min(seconds[name]):6.2f} s CPU ({min(seconds[first]) / min(seconds[name]):5.2f} x)   "
              f"{memory[name] / 2**20:7.0f} MiB ({memory[first] / memory[name]:5.1f} x)", flush=True)


def speak(model: SmolLM2, depth: int, tokens: int) -> None:
    prompt = list(range(200, 240))
    top = [layer for layer in fedms_ext.expert_layers(model.module).values() if layer.block > BLOCKS - depth]
    for experts in (1, 2):
        for expert in EXPERTS:
            fedms_ext.activate(model.module, expert, depth=0, applied_depth=depth)
        if experts == 1:
            fedms_ext.deactivate(model.module, "local")

        def mixture(hidden: Tensor) -> Tensor:
            log_p = model.head(hidden).log_softmax(-1)
            return log_p[0] if len(log_p) == 1 else mixture_log_prob(log_p.T, torch.tensor([0.6, 0.4]))

        def run(count: int) -> float:
            decoder = Decoder(model, top, BLOCKS - depth, experts)
            start = time.process_time()
            list(generate(decoder, prompt, mixture, (), Sampling(count)))
            return time.process_time() - start
        run(2)
        each = min((run(tokens + 1) - run(1)) / tokens for _ in range(3))
        print(f"{experts} expert{'s' * (experts > 1)}: {1 / each:.1f} tokens a second of the CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", choices=("generation", "depth"), help="time generation alone, or the steps at depth 4")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(100, 49_000, (BATCH, LENGTH))
    model = attached("int8")
    if asked.only != "depth":
        speak(model, 4, asked.tokens)
    if asked.only == "generation":
        return
    compare({"PEFT, 30 blocks, fp32, all logits": peft_step(ids),
             "depth 4, cached, int8, loss on all tokens": own_step(model, ids, 4, 1.0),
             "depth 4, cached, int8, loss on half of them": own_step(model, ids, 4, 0.5)}, asked.repeats)
    if asked.only == "depth":
        return
    compare({"PEFT, 30 blocks, fp32, all logits": peft_step(ids),
             "30 blocks, int8, loss on all tokens": own_step(model, ids, BLOCKS, 1.0)}, asked.repeats)


if __name__ == "__main__":
    main()
