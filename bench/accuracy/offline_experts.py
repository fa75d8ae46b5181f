"""What the pieces of fedms_plus are worth, without a federated run for each: stage 1 runs once with and once without the
prior, every client's local experts are trained once, and mixtures of their logits are then tried in seconds.

All samples are ones that no run of the study sees, so nothing is chosen on the study's test data. Accuracies in %, mean
over clients and mean of the worst tenth of them, with the mean cross-entropy.

    python -m bench.accuracy.offline_experts fashion --set data.alpha=0.1 --set data.max_samples=8000 \
        --set 'data.split=[0.3, 0.15, 0.55]'
"""
import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.config import load_config, with_run
from fedms.data import fashion, sentiment
from fedms.data.dataset import stratified_sample
from fedms.data.subset import Subset
from fedms.engines.local import LocalEngine
from fedms.federated.client import Client
from fedms.methods.fedavg_prior import log_prior
from fedms.methods.fedms_plus import COUNTS
from fedms.methods.steps import class_counts
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTask
from fedms.runs.tune import replaced
from fedms.storage.run_folder import RunFolder

EPOCHS, RATES = 4, (1e-3, 3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["fashion", "sentiment"])
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    config = with_run(load_config(asked.source, [*asked.set, "run.threads=1", "stage2.rounds=0"]), seed=asked.seed,
                      method="fedms_plus")
    with (mock.patch.object(fashion, "stratified_sample", unused),
          mock.patch.object(sentiment, "stratified_sample", unused)):
        session = LoadedTask(config, Progress())
    for in_stage1 in (False, True):
        try_on(session, replaced(config, {"plus.prior_in_stage1": in_stage1}))


def unused(strata: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """As `stratified_sample`, from what it leaves."""
    rest = np.setdiff1d(np.arange(len(strata)), stratified_sample(strata, total, rng))
    return rest[stratified_sample(strata[rest], total, rng)]


@dataclass
class Outputs:
    """A client's logits of one expert on its validation and test samples, the prior's shift included."""

    validation: Tensor
    test: Tensor


def try_on(session: LoadedTask, config) -> None:
    experiment, model = session.experiment(config), session.model
    with tempfile.TemporaryDirectory() as folder:
        model.start()
        engine = LocalEngine(experiment.method, experiment.server, model, experiment.clients, Subset(experiment.partition.global_test),
                             RunFolder.create(Path(folder) / "run", config), Progress())
        final = engine.final_message(engine.run(experiment.method.initial(model)))
        engine.folder.close()
    shared, depth = {**final.constants, **final.tensors}, final.applied_depth
    shifts = {c.id: log_prior(class_counts(model, c.train)) - log_prior(final.statistics[COUNTS]) for c in experiment.clients}

    print(f"\nstage 1 {'with' if config.plus.prior_in_stage1 else 'without'} the prior")
    with_shift = {}
    for name, share in (("global", 0.0), ("global + prior", 1.0)):
        found = {}
        for client in experiment.clients:
            model.clear()
            model.load("global", shared, depth=0, applied_depth=depth)
            model.shifts["global"] = (share * shifts[client.id]).float()
            found[client.id] = outputs(model, "global", client)
        tell(name, experiment.clients, model, found)
        with_shift = found
    for prior, share in (("both", 1.0), ("global", 0.0)):
        for rate in RATES:
            own = {c.id: local(model, c, shared, depth, (share * shifts[c.id]).float(), rate) for c in experiment.clients}
            tell(f"local, prior {prior}, rate {rate:g}", experiment.clients, model, own)
            tell("  half and half with global + prior", experiment.clients, model,
                 {i: Outputs((with_shift[i].validation + each.validation) / 2, (with_shift[i].test + each.test) / 2)
                  for i, each in own.items()})
            tell("  gate on validation samples", experiment.clients, model, gated(experiment.clients, model, with_shift, own))


def outputs(model, expert: str, client: Client) -> Outputs:
    return Outputs(*(model.opinions(expert, part).clone() for part in (client.validation, client.test)))


def local(model, client: Client, shared: dict, depth: int, shift: Tensor, rate: float) -> Outputs:
    """Trains a copy of the global expert; the epoch with the least validation loss counts, the start included."""
    model.clear()
    model.shifts["local"] = shift
    model.load("local", shared, depth=1, applied_depth=depth)
    params, labels = list(model.trainable("local").values()), model.targets(client.validation)
    shuffle = torch.Generator().manual_seed(client.id)

    def reached() -> tuple[float, Outputs]:
        found = outputs(model, "local", client)
        return model.task.score(found.validation, labels).loss or math.inf, found

    best = reached()
    for _ in range(EPOCHS):
        optimizer = torch.optim.AdamW(params, rate, weight_decay=0.0, fused=True)
        for rows in torch.randperm(len(client.train), generator=shuffle).split(client.config.stage2.batch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model.opinion("local", client.train, rows), model.targets(client.train, rows)).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        best = min(best, reached(), key=lambda found: found[0])
    return best[1]


def gated(clients, model, ours: dict[int, Outputs], own: dict[int, Outputs]) -> dict[int, Outputs]:
    """One gate for all clients, a logistic function of both experts' confidences, fitted to all validation samples."""
    def inputs(part: str, i: int) -> Tensor:
        return torch.cat([model.task.confidences(getattr(each[i], part)) for each in (ours, own)], 1)

    def mixture(part: str, i: int) -> Tensor:
        weights = ((inputs(part, i) - mean) / std @ slope + bias).sigmoid().unsqueeze(1)
        return (1 - weights) * getattr(ours[i], part) + weights * getattr(own[i], part)

    everywhere = torch.cat([inputs("validation", c.id) for c in clients])
    mean, std = everywhere.mean(0), everywhere.std(0) + 1e-6
    slope, bias = torch.zeros(everywhere.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, bias], max_iter=100)
    labels = torch.cat([model.targets(c.validation) for c in clients])

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(torch.cat([mixture("validation", c.id) for c in clients]), labels)
        total = total + 0.01 * slope.square().sum()
        total.backward()
        return total
    optimizer.step(loss)
    with torch.no_grad():
        return {c.id: Outputs(mixture("validation", c.id), mixture("test", c.id)) for c in clients}


def tell(name: str, clients, model, found: dict[int, Outputs]) -> None:
    scores = [model.task.score(found[c.id].test, model.targets(c.test)) for c in clients if len(c.test)]
    accuracies = np.sort([each.accuracy for each in scores])
    worst = accuracies[:math.ceil(len(accuracies) / 10)]
    print(f"{name:<36} {100 * accuracies.mean():5.1f}  worst 10 % {100 * worst.mean():5.1f}  "
          f"loss {np.mean([each.loss for each in scores]):.3f}", flush=True)


if __name__ == "__main__":
    main()
