"""The summary of a run, from its records alone: it can be made again at any time, and comes out the same."""
from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedms.config import RunConfig, config_from_dict
from fedms.errors import GO_ON, RunFolderError
from fedms.federated.server import STAGES
from fedms.foreign import few
from fedms.progress import perplexity
from fedms.storage.records import OPTIONAL, OUTCOME, RunRecords

MOST_REASONS = 5        # of failed visits that the notes name

# A gate is called collapsed when its mean entropy falls below this share of the largest possible, log 2: it then hardly
# mixes at all, whichever side it fell on.
COLLAPSED_BELOW = 0.2

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a run came to. Accuracies and shares are fractions in [0, 1], times seconds, sizes bytes.

    Attributes:
        method: Name of the method.
        model: `model.id` of the run file.
        fingerprint: SHA-256 of the foundation model's weights.
        dataset: `data.name` of the run file.
        classes: Names of the classes, in the order of the logits.
        prompts: Class prompts of each class, or None where there are none.
        seed: The seed.
        rounds: Number of rounds of each stage.
        personalized_accuracy: `mean`, `std` and `worst10` (mean of the worst tenth) of what clients answer in the end.
        zero_shot_accuracy: Mean accuracy of the foundation model without training, or None where it cannot classify.
        macro_f1: Mean macro F1 of what clients answer.
        calibration_error: Mean expected calibration error of what clients answer.
        auroc: Mean area under the ROC curve of what clients answer.
        gate: What the gate does, or None for a method without one.
        global_test_accuracy: Accuracy on the common test set, or None where there is none.
        unseen_accuracy: Of clients that did not take part: `as_it_arrives` and `after_training`.
        final_depth: Depth reached at the end of each stage.
        trainable_params: Largest number of parameters that a visit trained.
        trainable_percent: The same in percent of the foundation model's.
        bytes_up: Bytes that clients sent.
        bytes_down: Bytes that clients were sent.
        flops: Floating-point operations of all visits.
        seconds: Wall time, of all processes that worked on the run.
        simulated_seconds: Time on the clients' own devices, or None where their speed is not given.
        peak_memory_bytes: Largest memory of a visit.
        notes: What a reader of the figures should know.
        language: For language models: nats a token (`nats*`, means over clients), the perplexities that these stand for,
            the number of `tokens`, `bits_per_byte`, and `exact_match`, the share of test answers that greedy generation
            writes exactly; with `task.choices` mean `choice_accuracy*`, the shares of test samples whose own answer is found;
            None for other tasks.
        privacy: For runs with privacy: what they guarantee, `statement` in a sentence. What would be added up of numbers of
            single clients is then None.
    """

    method: str
    model: str
    fingerprint: str
    dataset: str
    classes: list[str]
    prompts: list[list[str]] | None
    seed: int
    rounds: dict[str, int]
    personalized_accuracy: dict[str, float | None]
    zero_shot_accuracy: float | None
    macro_f1: float | None
    calibration_error: float | None
    auroc: float | None
    gate: dict[str, Any] | None
    global_test_accuracy: float | None
    unseen_accuracy: dict[str, float | None] | None
    final_depth: dict[str, int | None]
    trainable_params: int | None
    trainable_percent: float | None
    bytes_up: int | None
    bytes_down: int | None
    flops: int | None
    seconds: float
    simulated_seconds: float | None
    peak_memory_bytes: int | None
    notes: list[str]
    language: dict[str, Any] | None = None
    privacy: dict[str, Any] | None = None

    @classmethod
    def of(cls, records: RunRecords) -> Summary:
        """Return the summary of a run whose clients have all been evaluated.

        Raises:
            RunFolderError: If they have not, or an older version wrote the records.
        """
        if records.outcome is None:
            raise RunFolderError(f"{records.path}: holds no {OUTCOME}, so the run has not been evaluated, or an older version "
                                 f"wrote it; {GO_ON}")
        config, outcome = config_from_dict(records.config), records.outcome
        seen = [client for client in records.clients if not client["unseen"]]
        unseen = [client for client in records.clients if client["unseen"]]
        tested = [client for client in seen if client["n_test"]]
        if (privacy := outcome.get("privacy")) is not None:
            return cls._private(config, outcome, privacy, records)
        # A server's clients come and go: those that it met are in the records, clients.count is how many it would take.
        members = ({visit["client"] for visit in records.visits} | {client["id"] for client in seen}
                   if config.run.engine == "flower" else range(config.clients.count))
        simulated = [line["simulated_seconds"] for line in records.rounds if line["simulated_seconds"] is not None]
        macro_f1, calibration_error, auroc = (mean(client.get(name) for client in tested)
                                              for name in ("macro_f1", "calibration_error", "auroc"))
        return cls(
            config.run.method, config.model.id, outcome["fingerprint"], config.data.name, outcome["classes"],
            outcome["prompts"], config.run.seed, {stage: getattr(config, stage).rounds for stage in STAGES},
            accuracies(seen), mean(client["accuracy"]["zero_shot"] for client in tested),
            macro_f1, calibration_error, auroc, gate_summary(tested, outcome["learns_gate"]),
            outcome["global_test_accuracy"],
            {"as_it_arrives": accuracies(unseen)["mean"], "after_training": outcome["unseen_after_training"]}
            if unseen else None, outcome["final_depth"],
            **_costs(records.visits), seconds=outcome["seconds"], simulated_seconds=sum(simulated) if simulated else None,
            notes=[*outcome["notes"], *augmentation_note(config), *_not_evaluated(members, seen),
                   *never_trained(config, outcome["personal_stages"], records.visits, members), *failures(records.visits)],
            language=language_summary(tested))

    @classmethod
    def _private(cls, config: RunConfig, outcome: Record, privacy: Record, records: RunRecords) -> Summary:
        """Return the summary of a run that recorded no numbers of single clients."""
        told = {name: value for name, value in privacy.items() if name != "mean_accuracy"}
        hides = privacy.get("sampling_rate") is not None
        traffic = {name: None if hides else sum(visit[name] for visit in records.visits) for name in ("bytes_up", "bytes_down")}
        return cls(
            config.run.method, config.model.id, outcome["fingerprint"], config.data.name, outcome["classes"],
            outcome["prompts"], config.run.seed, {stage: getattr(config, stage).rounds for stage in STAGES},
            {"mean": privacy["mean_accuracy"], "std": None, "worst10": None}, None, None, None, None, None,
            outcome["global_test_accuracy"], None, outcome["final_depth"], None, None, **traffic, flops=None,
            seconds=outcome["seconds"], simulated_seconds=None, peak_memory_bytes=None,
            notes=[*augmentation_note(config), *([] if hides else failures(records.visits))], privacy=told)


def summarize(folder: str | Path) -> dict[str, Any]:
    """Return the summary of the run in a folder as plain data, in the form of `summary.json`.

    Raises:
        RunFolderError: If the records are damaged, or the run has not been evaluated.
    """
    found = asdict(Summary.of(RunRecords.read(folder)))
    return {name: value for name, value in found.items() if value is not None or name not in OPTIONAL}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def accuracies(clients: Sequence[Record]) -> dict[str, float | None]:
    """Return mean, standard deviation and worst tenth of the clients' personalized accuracies.

    Each client with test samples counts the same.
    """
    found = np.array([client["accuracy"]["personalized"] for client in clients if client["n_test"]])
    worst = np.sort(found)[:max(1, math.ceil(len(found) / 10))]
    return {"mean": mean(found), "std": float(found.std()) if len(found) else None, "worst10": mean(worst)}


def gate_summary(clients: Sequence[Record], learns_gate: bool) -> dict[str, Any] | None:
    """Return what the gates of clients with test samples do; None if there is none.

    Args:
        clients: Lines of `clients.jsonl`.
        learns_gate: Whether the gate is trained. One that is fixed cannot collapse.
    """
    gated = [client for client in clients if client.get("gate_mean") is not None]
    if not gated:
        return None
    means = np.array([client["gate_mean"] for client in gated])
    entropy = mean(client["gate_entropy"] for client in gated)
    return {"mean": mean(means), "std_clients": float(means.std()),
            "std_samples": mean(client["gate_std"] for client in gated), "entropy": entropy,
            "collapsed": entropy < COLLAPSED_BELOW * math.log(2) if learns_gate else None,
            "half_mix_accuracy": mean(client["accuracy"]["half"] for client in gated),
            "oracle_accuracy": mean(client["accuracy"]["oracle"] for client in gated)}


def language_summary(clients: Sequence[Record]) -> dict[str, Any] | None:
    """Return the figures of a language model; None for another task.

    Nats a token are averaged over clients, never perplexities; the perplexities are those that the averages stand for.

    Args:
        clients: Lines of `clients.jsonl` of clients with test samples.
    """
    each = [client["language"] for client in clients if client.get("language")]
    if not each:
        return None
    nats = {name: mean(one.get(name) for one in each) for name in each[0] if name.startswith("nats")}
    perplexities = {name.replace("nats", "perplexity"): None if value is None else perplexity(value)
                    for name, value in nats.items()}
    chosen = sorted({name for one in each for name in one if name.startswith("choice_accuracy")})
    return {**nats, **perplexities, "tokens": sum(one["tokens"] for one in each),
            **{name: mean(one.get(name) for one in each) for name in ("bits_per_byte", "exact_match", *chosen)}}


def _costs(visits: Sequence[Record]) -> dict[str, Any]:
    """Return the fields of the summary that add up what visits cost, or take the largest."""
    def known(name: str) -> list[Any]:
        return [visit[name] or 0 for visit in visits]

    largest = {name: max(known(field), default=0) for name, field in (
        ("trainable_params", "trained_params"), ("trainable_percent", "trained_percent"),
        ("peak_memory_bytes", "peak_memory_bytes"))}
    return {**largest, **{name: sum(known(name)) for name in ("bytes_up", "bytes_down", "flops")}}


# Notes

def augmentation_note(config: RunConfig) -> list[str]:
    """Say that augmented images cannot be cached, where there are some."""
    how = " and ".join(config.data.augment)
    return [f"training images are augmented ({how}), so nothing that is computed of them is cached"] if how else []


def _not_evaluated(members: Collection[int], clients: Sequence[Record]) -> list[str]:
    missing = len(set(members) - {client["id"] for client in clients})
    return [f"{missing} of {len(members)} clients could not be evaluated; the summary is of the others"
            ] if missing > 0 else []


def failures(visits: Sequence[Record]) -> list[str]:
    """Return one line for each reason for which visits failed, the most frequent ones first."""
    failed: dict[str, list[Record]] = {}
    for visit in visits:
        if visit["status"] == "failed":
            failed.setdefault(str(visit["reason"]), []).append(visit)
    lines = []
    for reason, each in sorted(failed.items(), key=lambda item: -len(item[1])):
        clients = sorted({visit["client"] for visit in each})
        lines.append(f"{len(each)} visits failed, of client{'s' * (len(clients) > 1)} {few(clients)}; first in "
                     f"{each[0]['stage']}, round {each[0]['round']}: {reason}")
    return lines if len(lines) <= MOST_REASONS else [
        *lines[:MOST_REASONS], f"visits failed for {len(lines) - MOST_REASONS:,} more reasons, which visits.jsonl names"]


def never_trained(config: RunConfig, personal_stages: Iterable[str], visits: Sequence[Record],
                  members: Collection[int]) -> list[str]:
    """Say how many clients were never sampled in the stages that train what is their own.

    Args:
        config: The run file.
        personal_stages: Stages in which the method trains private tensors.
        visits: Lines of `visits.jsonl`.
        members: Ids of the clients that took part.
    """
    stages = [stage for stage in personal_stages if getattr(config, stage).rounds]
    if not stages:
        return []
    trained = {visit["client"] for visit in visits if visit["stage"] in stages and visit["status"] == "ok"}
    missing = len(set(members) - trained)
    where = " and ".join(stage.replace("stage", "stage ") for stage in stages)
    return [f"{missing} of {len(members)} clients were never trained in {where}, so they have learned nothing of their "
            "own and answer with what all begin with; a larger clients.fraction or more rounds reach them"] if missing else []
