"""What a model's tokenizer or image transform makes of fixed inputs: whether two machines would read the same data alike."""
from __future__ import annotations

import hashlib

import torch

from .dataset import Dataset, make_dataset
from .inputs import ImageInputs, TextInputs
from .labels import prompts_of
from .partitioning import Partition
from .shard import Shard, shard_of
from .user_data import inputs_of

TEXTS = ("The same text, everywhere.", "naïve façade — 東京 🙂 \t 3.14159", "MIXED case, URLs: https://example.org/a?b=1",
         "a", "word " * 600)
SIZES = ((64, 48), (31, 57), (300, 200))        # width and height of the images, in pixels


def probe(config, model) -> TextInputs | ImageInputs:
    """Fixed samples as the model reads them. config: the run file's [data] table."""
    content = list(TEXTS) if model.reads == "text" else [_gradient(*size) for size in SIZES]
    return inputs_of(content, [f"probe {i}" for i in range(len(content))], model, "probe", config.max_tokens)


def preprocessing_fingerprint(config, model) -> str:
    """SHA-256 (hex) of `probe`: the same where the same sample becomes the same tokens or pixels."""
    return hashlib.sha256(probe(config, model).digest()).hexdigest()


def without_samples(config, model) -> Shard:
    """What a server has that sees nobody's data: the names of the classes, and no sample.

    Args:
        config: the run file's [data] table; its classes must be named.
    """
    inputs = probe(config, model)
    dataset: Dataset = make_dataset(config.name, inputs, torch.zeros(len(inputs), dtype=torch.int64), config.classes,
                                    prompts=prompts_of(config, model, config.classes))
    return shard_of(dataset, Partition((), (), torch.empty(0, dtype=torch.int64), ()), ())


def _gradient(width: int, height: int):
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=-1).astype(np.uint8), "RGB")
