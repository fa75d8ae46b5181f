"""What a language model answers before and after its training: a page of samples for the report."""
from __future__ import annotations

import json
from pathlib import Path

from fedms import data
from fedms.data.subset import Subset
from fedms.exports.language_model import open_language_model
from fedms.models.generation import Sampling, text_pieces
from fedms.progress import Progress
from fedms.storage.durable import write_durably
from fedms.storage.records import SAMPLES
from fedms.training.answering import Answerer, Speaker


def write_samples(run: Path, clients: int = 3, sampling: Sampling = Sampling(),
                  progress: Progress | None = None, device: str = "auto") -> Path:
    """Ask some clients of a finished run the first question of their test samples, and write what is answered.

    Args:
        run: Run folder.
        clients: How many clients, those with the lowest ids.
        sampling: How tokens are chosen.
        progress: Told of what is being loaded, and which client answers.
        device: Where they are computed, as in `[run] device`.

    Returns:
        The path of `samples.json` in the run folder: for each client the question, the answer in the data, that of the
        foundation model alone, and the client's own.

    Raises:
        RunFolderError, CheckpointError, ConfigError, ModelError, DataError: As `fedms generate` does, and if the data
            cannot be read again.
    """
    progress = progress or Progress()
    progress.phase(f"loading the model of {run}")
    language = open_language_model(run, device=device)
    model, config, tokenizer = language.model, language.trained.task.config, language.tokenizer
    dataset = data.load(config.data, model.foundation)
    partition = data.partition(dataset, config.data, config.clients, config.run.seed)
    found: list[dict[str, object]] = []
    asked = [split for split in partition.clients if len(split.test)][:clients]
    for number, client in enumerate(asked, start=1):
        progress.phase(f"client {client.id if client.group is None else client.group} answers ({number} of {len(asked)})")
        index = int(Subset(client.test).indices[0])
        first, last = (int(dataset.texts.offsets[index + i]) for i in (0, 1))
        ids = dataset.texts.fields["input_ids"][first:last].tolist()
        start = int(dataset.answers[index])

        def said(answerer: Answerer) -> str:
            return "".join(text_pieces(tokenizer, answerer.tokens(ids[:start], sampling), language.stop_tokens))

        model.clear()
        before = said(Answerer(model, Speaker((None,))))
        after = said(language.answerer(client.id))
        found.append({"client": client.id, "group": client.group, "prompt": tokenizer.decode(ids[:start]),
                      "expected": tokenizer.decode(ids[start:], skip_special_tokens=True), "before": before, "after": after})
    write_durably(run / SAMPLES, json.dumps(found, ensure_ascii=False, indent=1).encode(), private=True)     # it quotes test data
    return run / SAMPLES
