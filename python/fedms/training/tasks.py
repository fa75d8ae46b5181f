"""The task that a run file names, made for a model and a data set."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fedms.config import RunConfig
from fedms.data import Dataset
from fedms.errors import ConfigError
from fedms.models import FoundationModel
from fedms.models.causal_lm import CausalModel
from fedms.models.heads import LinearHead, TextHead
from fedms.tasks import CausalLM, Classification, LogitMixingLM, Task
from fedms.training.device import format_on


def task_of(foundation: FoundationModel, dataset: Dataset, config: RunConfig, device: torch.device) -> Task:
    """Return the task that `[task] kind` names.

    Raises:
        ConfigError: If the model or the data do not suit it.
    """
    return TASKS[config.task.kind](foundation, dataset, config, device)


def _classification(foundation: FoundationModel, dataset: Dataset, config: RunConfig, device: torch.device) -> Task:
    if dataset.answers is not None:
        raise ConfigError(f'task.kind: "classification", but {dataset.name} holds answers in words; use "causal_lm"')
    prompts = (None if dataset.prompts is None or foundation.zero_shot_temperature is None else
               foundation.class_embeddings(dataset.prompts, config.data.max_tokens))
    if config.model.head == "text" and prompts is None:
        raise ConfigError(f'model.head: "text" needs a model that embeds class prompts, and {foundation.name} has no '
                          'text tower; use "linear"')
    temperature = config.model.temperature or foundation.zero_shot_temperature or 1.0
    classes = len(dataset.classes)
    new_head: Callable[[], nn.Module]
    if config.model.head == "text":
        new_head = partial(TextHead, prompts, temperature, config.model.learn_temperature)
    else:
        new_head = partial(LinearHead, foundation.feature_dim, classes, prompts, temperature)
    return Classification(classes, new_head, None if prompts is None else prompts.to(device), temperature)


def _causal_lm(foundation: FoundationModel, dataset: Dataset, config: RunConfig, device: torch.device) -> Task:
    if not isinstance(foundation, CausalModel):
        raise ConfigError(f'task.kind: "causal_lm" needs a causal language model, and {foundation.name} is none')
    if dataset.answers is None:
        raise ConfigError(f'task.kind: "causal_lm", but {dataset.name} holds labels; use "classification", or data with answers')
    if config.head.dtype != "fp32":
        foundation.quantize_head(format_on(device, config.head.dtype))
    if config.gate.mixing == "layers" or config.gate.on == "probabilities":
        return CausalLM(foundation.head, config.head.chunk)
    try:
        return LogitMixingLM(foundation.head, config.head.chunk)
    except ValueError as error:
        raise ConfigError(f"gate.on: {error}") from None


TASKS = {"classification": _classification, "causal_lm": _causal_lm}
