"""Decode images into what a vision model reads."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedms.errors import DataError

from .inputs import ImageInputs
from .samples import counted

# What Pillow reads; a name with another ending is no image to us, and is said to be left out.
IMAGES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".pgm",
          ".ppm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif")
AT_ONCE = 64        # images that are decoded and resized together
MOST_LEFT_OUT = 0.05    # share of a data set's images that may be unreadable; one always may

_TRAITS = {
    "frames": "{} several pages or frames, of which the first is read",
    "turned": "{} turned as the camera's EXIF entry says",
    "gray": "{} gray, without colors",
    "transparent": "{} transparent parts, which become white",
}


@dataclass(frozen=True)
class Images:
    """Images as a model reads them. kept: position of each among those that were asked for. notes: of oddities."""

    inputs: ImageInputs
    kept: list[int]
    notes: tuple[str, ...]


def read_images(content: Sequence[Any], places: Sequence[str], model, source: str, *, strict: bool) -> Images:
    """Decode images and bring them to the model's size.

    Args:
        content: PIL images, paths, or the bytes of files.
        places: Where each image came from.
        model: The foundation model.
        source: Where all of them came from, for error messages.
        strict: Whether one image that cannot be read is an error. Otherwise up to `MOST_LEFT_OUT` of them, and one in any case, are
            left out with a note.

    Raises:
        DataError: If images cannot be read. The message names up to five of them.
    """
    most = 0 if strict else max(1, int(MOST_LEFT_OUT * len(content)))
    every: Tensor | None = None
    kept: list[int] = []
    bad: list[str] = []
    traits = Counter[str]()
    for start in range(0, len(content), AT_ONCE):
        opened = []
        for i in range(start, min(start + AT_ONCE, len(content))):
            try:
                image, has = _decode(content[i])
                opened.append((i, image))
                traits.update(has)
            except Exception as error:  # Pillow's decoders raise many types
                bad.append(f"{places[i]} ({error})")
        if len(bad) <= most and opened:
            for positions, pixels, failure in _prepared(opened, model, None if every is None else every.shape[1:]):
                if failure is not None:
                    bad.append(f"{places[positions[0]]} ({failure})")
                    continue
                if every is None:
                    every = torch.empty(len(content), *pixels.shape[1:], dtype=pixels.dtype)
                every[len(kept):len(kept) + len(positions)] = pixels
                kept += positions
    shown = "; ".join(bad[:5]) + (f", and {len(bad) - 5} more" if len(bad) > 5 else "")
    if len(bad) > most or every is None:
        raise DataError(f"{source}: {len(bad)} of {len(content)} images cannot be read: {shown}; repair or remove them")
    notes = [f"{source}: {counted(traits[trait], 'image')} {text.format(_verb(trait, traits[trait]))}"
             for trait, text in _TRAITS.items() if traits[trait]]
    if bad:
        notes.append(f"{source}: {counted(len(bad), 'image')} of {len(content)} cannot be read and left out: {shown}")
    pixels = every[:len(kept)]
    transform = model.pixel_transform if pixels.dtype == torch.uint8 else None
    return Images(ImageInputs(pixels, model.image_tokens, source, transform), kept, tuple(notes))


def gray_inputs(pixels: Tensor, model, source: str) -> ImageInputs:
    """Return small gray images as a model reads them.

    If they have not the size that the model reads, its image processor brings them to it.

    Args:
        pixels: (n, 1, H, W) float32 in [0, 1].
        model: The foundation model.
        source: Where the images come from, for error messages.

    Raises:
        DataError: If the images hold NaN or infinity.
    """
    inputs = ImageInputs(pixels, model.image_tokens, source)
    if model.pixel_shape == pixels.shape[1:]:
        return inputs
    from PIL import Image

    images = [Image.fromarray(image) for image in (255 * pixels[:, 0]).round().to(torch.uint8).numpy()]
    return read_images(images, [f"image {i}" for i in range(len(images))], model, source, strict=True).inputs


def _verb(trait: str, count: int) -> str:
    return ("has" if count == 1 else "have") if trait in ("frames", "transparent") else "is" if count == 1 else "are"


def _prepared(opened: list[tuple[int, Any]], model,
              shape: torch.Size | None) -> list[tuple[list[int], Any, Exception | None]]:
    """Return (positions, pixels, None) of images together; if that fails, of each image alone, or (position, None, error)."""
    try:
        pixels = model.prepare([image for _, image in opened])
        if shape is not None and pixels.shape[1:] != shape:
            raise ValueError(f"becomes pixels of shape {tuple(pixels.shape[1:])}, the images before it {tuple(shape)}")
        return [([i for i, _ in opened], pixels, None)]
    except Exception as error:  # image processors raise many types
        if len(opened) == 1:
            return [([opened[0][0]], None, error)]
    found = []
    for one in opened:
        found += _prepared([one], model, shape)
        shape = next((pixels.shape[1:] for _, pixels, _ in found if pixels is not None), shape)
    return found


def open_image(item: Any):
    """Return the first frame of an image as it is meant to be seen: turned as its EXIF entry says, on a white ground.

    Args:
        item: A PIL image, a path, or the bytes of a file.

    Raises:
        ValueError: If the image has more than 8 bits a channel, whose scale is not known. Pillow may raise other errors.
    """
    return _decode(item)[0]


def _decode(item: Any) -> tuple[Any, list[str]]:
    """Return the image, and its traits among `_TRAITS`."""
    from PIL import Image, ImageOps

    image = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    depth = _depth(image, item)
    if depth > 8:
        raise ValueError(f"{image.mode}: more than 8 bits a channel ({depth}); save it with 8")
    traits = ["frames"] if getattr(image, "is_animated", False) else []
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        traits.append("turned")
        image = ImageOps.exif_transpose(image)
    if image.mode in ("1", "L", "LA", "La"):
        traits.append("gray")
    if not image.has_transparency_data:
        return image, traits
    seen: Any = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if seen.getextrema()[3][0] < 255:
        traits.append("transparent")
    white = Image.new("RGBA", seen.size, "white")
    return Image.alpha_composite(white, seen).convert("RGB"), traits


def _depth(image: Any, item: Any) -> int:
    """Return the bits of a channel of an image that Pillow has opened and not loaded: it reads some deeper formats as 8 bits."""
    if image.mode[0] in "IF":
        return 16 if ";16" in image.mode else 32
    bits = [8, *_tagged_bits(image)]
    for tile in getattr(image, "tile", ()):
        for value in (tile[0], *(tile[3] if isinstance(tile[3], tuple) else (tile[3],))):
            if isinstance(value, str) and re.search(r"(^|[A-Za-z];)16[BLNS]*$|^SGI16$", value) and not value.startswith("BGR"):
                bits.append(16)
        if tile[0] in ("ppm", "ppm_plain") and isinstance(tile[3], tuple):
            bits += [value.bit_length() for value in tile[3] if isinstance(value, int)]
    if image.format in ("JPEG2000", "AVIF"):
        data = item if isinstance(item, bytes) else Path(item).read_bytes() if isinstance(item, (str, Path)) else b""
        bits += _coded_bits(data, image.format)
    return max(bits)


def _tagged_bits(image: Any) -> list[int]:
    """BitsPerSample of a TIFF."""
    found = image.tag_v2.get(258, ()) if image.format == "TIFF" and hasattr(image, "tag_v2") else ()
    return [int(value) for value in (found if isinstance(found, tuple) else (found,))]


def _coded_bits(data: bytes, kind: str) -> list[int]:
    """Return the bits of each channel: of JPEG 2000 from the SIZ segment (ISO 15444-1, A.5.1), of AVIF from the pixi box (ISO
    23008-12).
    """
    if kind == "AVIF":
        at = data.find(b"pixi")
        return list(data[at + 9:at + 9 + data[at + 8]]) if 0 <= at < len(data) - 8 else []
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(data) < at + 42:
        return []
    count = int.from_bytes(data[at + 40:at + 42], "big")
    return [(value & 0x7F) + 1 for value in data[at + 42:at + 42 + 3 * count:3]]
