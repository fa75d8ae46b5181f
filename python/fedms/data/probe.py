"""What a model's tokenizer or image transform makes of fixed inputs: whether two machines would read the same data alike."""
from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .conversations import question
from .dataset import Dataset, make_dataset
from .inputs import ImageInputs, TextInputs
from .labels import prompts_of
from .language import UNLABELED, as_tokens
from .partitioning import Partition
from .shard import Shard, shard_of
from .user_data import inputs_of

TEXTS = ("The same text, everywhere.", "naïve façade — 東京 🙂 \t 3.14159", "MIXED case, URLs: https://example.org/a?b=1",
         "a", "word " * 600)
SIZES = ((64, 48), (31, 57), (300, 200))        # width and height of the images, in pixels


def probe(config, model) -> tuple[TextInputs | ImageInputs, Tensor | None]:
    """Return fixed samples as the model reads them, and where their answers begin, if it learns answers.

    Args:
        config: The run file's [data] table.
        model: A foundation model.
    """
    if model.reads == "conversations":
        asked = [question(text, text, f"probe {i}") for i, text in enumerate(TEXTS)]
        encoded = as_tokens(asked, config.model_copy(update={"long_answers": "cut"}), model)
        return encoded.inputs, encoded.starts
    content = list(TEXTS) if model.reads == "text" else [_gradient(*size) for size in SIZES]
    return inputs_of(content, [f"probe {i}" for i in range(len(content))], model, "probe", config.max_tokens), None


def preprocessing_fingerprint(config, model) -> str:
    """Return the SHA-256, in hexadecimal, of `probe`. It is equal if the same sample becomes the same tokens or pixels."""
    return hashlib.sha256(probe(config, model)[0].digest()).hexdigest()


def without_samples(config, model) -> Shard:
    """Return the shard of a server that has no data: the names of the classes, and no samples.

    Args:
        config: The [data] table of the run file. It must name the classes if labels are learned.
        model: The foundation model.
    """
    inputs, answers = probe(config, model)
    classes = config.classes if answers is None else UNLABELED
    prompts = prompts_of(config, model, config.classes) if answers is None else None
    dataset: Dataset = make_dataset(config.name, inputs, torch.zeros(len(inputs), dtype=torch.int64), classes,
                                    prompts=prompts, answers=answers)
    return shard_of(dataset, Partition((), (), torch.empty(0, dtype=torch.int64), ()), ())


def _gradient(width: int, height: int):
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=-1).astype(np.uint8), "RGB")
