"""Does a client's language model find each prompt's own answer among those of other test samples?"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedms.data.choices import other_answers, with_answers
from fedms.federated.client import Client, Message, Private
from fedms.federated.method import Method
from fedms.seeds import generator
from fedms.training.expert_model import ExpertModel


def choice_accuracies(method: Method, model: ExpertModel, client: Client, private: Private, final: Message,
                      opinions: Mapping[str, Tensor | None]) -> dict[str, float | None]:
    """Return the fields of a client's record under "language" that `[task] choices` asks for.

    An answer's score is the mean log-probability of its tokens after the prompt. A sample counts as right if its own answer has
    a higher score than each of `choices` - 1 different answers of the client's other test samples, drawn by the run's seed.

    Args:
        opinions: Opinions (U, K) about the client's test samples, by "personalized" and "zero_shot".

    Returns:
        `choice_accuracy` in [0, 1], and `choice_accuracy_zero_shot` of the foundation model alone; both None for a client whose
        test samples have fewer different answers than `choices`.
    """
    dataset, part, choices = model.dataset, client.test, model.config.task.choices
    drawn = other_answers(dataset, part, choices - 1, generator(model.config.run.seed, "choices", client.id))
    if drawn is None:
        return {"choice_accuracy": None, "choice_accuracy_zero_shot": None}
    own_counts = dataset.units(part.indices)
    others = with_answers(dataset, part, drawn, model.config.data.max_tokens)
    counts = others.units(torch.arange(len(others)))
    model.clear()
    with model.reading(others) as every:
        found = {"": method.predict(model, every, private, final).personalized, "_zero_shot": model.zero_shot(every)}
    return {f"choice_accuracy{name}": float(
        (_scores(opinions[of], own_counts)[:, None] > _scores(found[name], counts).view(drawn.shape)).all(1).double().mean())
        for name, of in (("", "personalized"), ("_zero_shot", "zero_shot"))}


def _scores(opinion: Tensor, counts: Tensor) -> Tensor:
    """Return the mean log-probability (n,) float64 of the tokens of n answers from an opinion (U, K) and their numbers (n,)."""
    log_p = opinion[:, 0].double().cpu()
    sums = torch.zeros(len(counts), dtype=torch.float64)
    return sums.index_add_(0, torch.repeat_interleave(torch.arange(len(counts)), counts), log_p) / counts
