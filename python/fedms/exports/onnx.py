"""Write one expert as an ONNX file, from inputs to logits."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fedms.errors import ConfigError, ModelError
from fedms.exports.manifest import write_manifest
from fedms.exports.merged import merge_expert
from fedms.exports.trained_run import TrainedRun
from fedms.models import FoundationModel
from fedms.models.causal_lm import CausalModel
from fedms.tensors import Tensors


def write(folder: Path, trained: TrainedRun, foundation: FoundationModel, client: str | None) -> None:
    """Write `model.onnx` into an empty folder.

    Args:
        folder: The folder.
        trained: What the run trained.
        foundation: Its foundation model, whose weights are changed.
        client: Id or group of the client whose expert is written, or None for the global expert.

    Raises:
        ConfigError: If there is no such client or expert, or the model is a language model.
        ModelError: If the packages for it are missing, or torch cannot export the model.
    """
    if isinstance(foundation, CausalModel):
        raise ConfigError("--format: onnx holds one pass, without the key-value cache that generation needs; accepted for a "
                          "language model: merged, peft, mixture")
    try:
        import onnxscript  # noqa: F401  torch's exporter is made of it
    except ImportError as error:
        raise ModelError("--format onnx needs the packages onnx and onnxscript; pip install 'fedms[onnx]'") from error
    name, head = merge_expert(trained, foundation, client)
    if foundation.reads == "text":
        inputs = foundation.tokenize(["a", "a a a"], trained.task.config.data.max_tokens).batch(torch.arange(2))
    else:
        inputs = {"pixel_values": torch.zeros(2, *foundation.pixel_shape)}
    names = tuple(inputs)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    axes = {0: batch, 1: tokens} if foundation.reads == "text" else {0: batch}
    try:
        torch.onnx.export(_Classifier(foundation, head, names).eval(), tuple(inputs.values()), folder / "model.onnx",
                          dynamo=True, input_names=list(names), output_names=["logits"], verbose=False, external_data=False,
                          dynamic_shapes=((axes,) * len(names),))
    except Exception as error:  # torch's exporter raises many types
        raise ModelError(f"torch's ONNX exporter cannot export a {type(foundation.module).__name__}: "
                         f"{str(error).strip().splitlines()[0]}") from error
    write_manifest(folder, "onnx", trained.task, expert=name)


class _Classifier(nn.Module):
    """From a batch of inputs to logits (B, C).

    Args:
        foundation: The model, with the expert in its weights.
        head: `weight` (C, D) and `bias` (C,).
        names: Names of the arguments, in their order.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, foundation: FoundationModel, head: Tensors, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.foundation, self.names = foundation.module, [foundation], names
        self.register_buffer("weight", head["weight"])
        self.register_buffer("bias", head["bias"])

    def forward(self, *inputs: Tensor) -> Tensor:
        features = self.foundation[0].features(dict(zip(self.names, inputs)))
        return features @ self.weight.T + self.bias
