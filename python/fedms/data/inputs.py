"""Inputs of a foundation model: token sequences or images, addressed by the index of the sample.

Samples are stored without padding, and a batch is padded to its longest row, so that short sentences cost little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedms.errors import DataError


@dataclass(frozen=True)
class TextInputs:
    """Tokenized texts of different lengths.

    Attributes:
        fields: By name, (total,) int64: the tokens of all samples one after another ("input_ids", and "token_type_ids" if the
            tokenizer makes it). The attention mask follows from the lengths.
        offsets: (n + 1,) int64; sample i is [offsets[i], offsets[i + 1]) of every field.
        pad_values: By name, the value that fills the end of a short row.
    """

    fields: dict[str, Tensor]
    offsets: Tensor
    pad_values: dict[str, int]
    lengths: Tensor = field(init=False)  # (n,) int64, tokens of each sample, special tokens included

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", self.offsets[1:] - self.offsets[:-1])
        for name, values in self.fields.items():
            if values.dtype != torch.int64 or values.shape != (int(self.offsets[-1]),):
                raise DataError(
                    f"text field {name!r}: got {values.dtype} of shape {tuple(values.shape)}, "
                    f"expected torch.int64 of shape ({int(self.offsets[-1])},)"
                )
        if len(self) and int(self.lengths.min()) < 1:
            raise DataError(f"sample {int(self.lengths.argmin())} has no tokens")

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward for samples `indices` (B,) int64.

        Int64 tensors of shape (B, T), T the longest of these samples, padded on the right; "attention_mask"
        is 1 on tokens and 0 on padding.
        """
        lengths = self.lengths[indices]
        width = int(lengths.max()) if lengths.numel() else 0
        column = torch.arange(width)
        mask = column < lengths[:, None]
        position = torch.where(mask, self.offsets[:-1][indices][:, None] + column, 0)
        batch = {
            name: torch.where(mask, values[position], self.pad_values[name])
            for name, values in self.fields.items()
        }
        batch["attention_mask"] = mask.to(torch.int64)
        return batch

    def digest(self) -> bytes:
        return _digest({**self.fields, "offsets": self.offsets})

    def keys(self) -> list[bytes]:
        """Return a hash of each sample's content."""
        tokens, ends = self.fields["input_ids"].numpy(), self.offsets.tolist()
        return [_short_hash(tokens[start:end]) for start, end in zip(ends, ends[1:])]


@dataclass(frozen=True)
class ImageInputs:
    """Images in memory.

    Attributes:
        pixels: (n, C, H, W) float32, finite, in the range that the model expects; or uint8, with `transform`.
        tokens: Number of tokens of an image in the blocks of the model (patches and the class token).
        source: Where the images came from, for error messages.
        transform: (scale, shift), each (C, 1, 1): the model sees pixels * scale + shift.
    """

    pixels: Tensor
    tokens: int
    source: str
    transform: tuple[Tensor, Tensor] | None = None
    lengths: Tensor = field(init=False)  # (n,) int64, constant

    def __post_init__(self) -> None:
        expected = torch.float32 if self.transform is None else torch.uint8
        if self.pixels.dtype != expected or self.pixels.dim() != 4:
            raise DataError(
                f"{self.source}: images are {self.pixels.dtype} of shape {tuple(self.pixels.shape)}, "
                f"expected {expected} of shape (n, channels, height, width)"
            )
        bad = ~torch.isfinite(self.pixels).flatten(1).all(dim=1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise DataError(
                f"{self.source}: image {first} holds NaN or infinity ({int(bad.sum())} of {len(bad)} do); "
                "repair or remove these images"
            )
        object.__setattr__(self, "lengths", torch.full((len(self.pixels),), self.tokens, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward for samples `indices` (B,) int64:
        "pixel_values" (B, C, H, W) float32."""
        pixels = self.pixels[indices]
        return {"pixel_values": pixels if self.transform is None else torch.addcmul(self.transform[1], pixels.float(),
                                                                                   self.transform[0])}

    def augmented(self, indices: Tensor, how: Sequence[str]) -> ImageInputs:
        """Return the images `indices` (B,) with random changes drawn from PyTorch's generator.

        "flip" mirrors half of them; "shift" moves each by up to an eighth of its size and repeats the edges.
        """
        pixels = self.pixels[indices]
        count, _, height, width = pixels.shape
        if "flip" in how:
            pixels = torch.where(torch.rand(count, 1, 1, 1) < 0.5, pixels.flip(3), pixels)
        if "shift" in how:
            y, x = (_shifted(count, size) for size in (height, width))
            pixels = pixels[torch.arange(count)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        return replace(self, pixels=pixels)

    def digest(self) -> bytes:
        return _digest({"pixels": self.pixels, **dict(zip(("scale", "shift"), self.transform or ()))})

    def keys(self) -> list[bytes]:
        """Return a hash of each sample's content."""
        return [_short_hash(image) for image in self.pixels.numpy()]


def _shifted(count: int, size: int) -> Tensor:
    """Return, for each image, the indices from which its shifted rows or columns come, (count, size) int64."""
    most = max(1, size // 8)
    return (torch.arange(size) + torch.randint(-most, most + 1, (count, 1))).clamp(0, size - 1)


def _short_hash(array) -> bytes:
    return hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def _digest(tensors: dict[str, Tensor]) -> bytes:
    """Return the SHA-256 of the tensors' names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.digest()
