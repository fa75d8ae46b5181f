"""A training step of a transformer encoder on a GPU: forward, backward, AdamW on the experts.

    python -m bench.steps.bench_gpu_step [--quick] [--seconds S] [--json FILE] [--rehearse]

The encoder has the sizes of ViT-B/16 (12 blocks, width 768, 197 tokens). LoRA of rank 16 on every Linear layer of the
blocks, trained in all blocks or in the last three. Peers: PEFT on the same model, also compiled (not with --quick), and
the frozen model with the gradient of its input, which is what a step costs without LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench.harness.gpu_clock import Report
from torch import Tensor, nn

import fedms_ext
from fedms_ext import LoRA


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self, blocks: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def with_experts(model: Encoder, rank: int, depth: int) -> nn.Module:
    model = copy.deepcopy(model)
    fedms_ext.attach(model, "all-linear", {"global": LoRA(rank, alpha=2 * rank)})
    fedms_ext.activate(model, "global", depth=depth)
    return model


def with_peft(model: Encoder, rank: int, depth: int) -> nn.Module:
    import peft

    last = list(range(len(model.blocks) - depth, len(model.blocks)))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["qkv", "out", "up", "down"],
                             layers_to_transform=last, layers_pattern="blocks")  # fmt: skip
    return peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=x.is_cuda, foreach=True)

    def call() -> Tensor:
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    return call


def run(report: Report, sizes: tuple[int, int, int, int, int]) -> None:
    blocks, width, heads, batch, tokens = sizes
    torch.manual_seed(0)
    frozen = Encoder(blocks, width, heads).to(report.clock.device, report.dtype).requires_grad_(False)
    x = torch.randn(batch, tokens, width, device=report.clock.device, dtype=report.dtype)
    for depth in (blocks, max(1, blocks // 4)):
        seen = x.clone().requires_grad_()
        calls = {"frozen model": lambda: torch.autograd.grad(frozen(seen).float().square().mean(), seen)}
        calls["fedms"] = step(with_experts(frozen, 16, depth), x)
        try:
            calls["PEFT"] = step(with_peft(frozen, 16, depth), x)
            if x.is_cuda and not report.quick:  # minutes of compilation
                calls["PEFT, compiled"] = step(torch.compile(with_peft(frozen, 16, depth), dynamic=False), x)
        except ImportError:
            pass  # the report names the peers that it has
        title = f"{blocks} blocks of width {width}, {batch} x {tokens} tokens, depth {depth}"
        report.add(title, dict(sizes=sizes, depth=depth), calls, "frozen model")


def main() -> None:
    report = Report(__doc__, seconds=2.0, quick_seconds=0.2)
    run(report, (2, 32, 2, 2, 40) if report.rehearse else (12, 768, 12, 64, 197))
    report.close()


if __name__ == "__main__":
    main()
