"""Predictions of a client for inputs that no run has seen."""
from __future__ import annotations

from typing import Any

import torch

from fedms import methods
from fedms.data import Dataset, ImageInputs, TextInputs
from fedms.data.subset import Subset
from fedms.errors import ConfigError
from fedms.exports.trained_run import Task, TrainedRun
from fedms.federated.client import Private
from fedms.federated.method import Prediction
from fedms.models import FoundationModel
from fedms.training.device import choose
from fedms.training.expert_model import ExpertModel


def bind(foundation: FoundationModel, task: Task, device: str = "cpu") -> ExpertModel:
    """Attach experts to a foundation model, for a task and without data: :func:`predict` gives it some.

    Args:
        foundation: The model, which is moved to the device.
        task: What the experts were trained for.
        device: Where it computes, as in `[run] device`. What is only written to files has nothing to compute, and stays on
            the CPU.

    Raises:
        ConfigError: If the run file does not fit the model, or the device is not there.
    """
    config = task.config
    uncached = config.model_copy(update={"sal": config.sal.model_copy(update={"cache": "off"})})
    return ExpertModel(foundation, _unlabeled(task, None, 0), uncached, device=choose(device, config.model.frozen).device)


def predict(model: ExpertModel, trained: TrainedRun, client: int | None, inputs: TextInputs | ImageInputs) -> Prediction:
    """Return what a client predicts; without a client, what the global expert does.

    Args:
        model: What :func:`bind` returned.
        trained: The run that trained the experts.
        client: Id of the client, or None.
        inputs: Texts or images as the model reads them, n of them.

    Returns:
        Logits (n, C) and, for a mixture, the gate's weights (n, 2).

    Raises:
        ConfigError: Without a client, if the method shares no expert.
    """
    model.dataset = _unlabeled(trained.task, inputs, len(inputs))
    model.clear()
    private = Private() if client is None else trained.private.get(client, Private())
    prediction = methods.create(trained.task.config).predict(model, Subset(torch.arange(len(inputs))), private, trained.final)
    if client is not None:
        return prediction
    if prediction.global_ is None:
        raise ConfigError(f"client: the method {trained.task.config.run.method} shares no expert; give a client")
    return Prediction(prediction.global_, global_=prediction.global_)


def _unlabeled(task: Task, inputs: Any, count: int) -> Dataset:
    """Return a data set of `count` samples without known labels: all labels are 0.

    For a language model the answers begin at the second token, so that it is asked about every token.
    """
    answers = torch.ones(count, dtype=torch.int64) if task.config.task.kind == "causal_lm" else None
    return Dataset("new", inputs, torch.zeros(count, dtype=torch.int64), task.classes, task.prompts, None, (), "",
                   answers=answers)
