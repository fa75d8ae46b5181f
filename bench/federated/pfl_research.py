"""FedAvg of LoRA with pfl-research (PyPI `pfl`) beside the embedded engine: `python -m bench.federated.pfl_research --help`.

The same foundation model (MiniLM), samples, clients, LoRA shapes and initial values, trained head, local optimizer,
clipping, batch size and rounds; all clients in every round, all blocks trained. On pfl's side the LoRA layers are PEFT's,
as a user of pfl would have them, and local batches come in the order of the samples, as pfl gives them (ours are
shuffled). Our rounds also judge the received model on each client's validation samples, send what is trained through the
wire format, check it, and write records and a checkpoint; pfl's evaluation is switched off. The runs take turns, seed by
seed; each run's first round is left out of the times. Both end on the same test samples.

`pfl` does not need to be in the environment: `pip install --no-deps --target DIR pfl dp-accounting prv-accountant
multiprocess dill absl-py mpmath`, then `PYTHONPATH=DIR python -m bench.federated.pfl_research`.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fedms import models
from fedms.config import RunConfig, load_config
from fedms.federated.evaluation import accuracy
from fedms.progress import Progress
from fedms.runs import run
from fedms.runs.experiment import Experiment, LoadedTask
from fedms.storage.records import RunRecords
from fedms.tensors import Tensors
from bench.harness.environment import save


def configuration(options: argparse.Namespace, seed: int) -> RunConfig:
    return load_config("sentiment", [
        f"data.max_samples={options.samples}", "data.partition=iid", f"clients.count={options.clients}", "clients.unseen=0",
        f"stage1.rounds={options.rounds}", "stage2.rounds=0", "run.method=fedavg", "sal.schedule=all", "stage1.lr=1e-3",
        f"run.threads={options.threads}", f"run.seed={seed}"])


def ours(config: RunConfig, folder: Path) -> dict:
    summary = run.run(config, folder)
    return {"seconds": [record["seconds"] for record in RunRecords.read(folder).rounds],
            "accuracy": summary["global_test_accuracy"]}


class Net(nn.Module):
    """What pfl trains: PEFT's LoRA in the foundation model, and the head; a batch is row numbers of the data set."""

    def __init__(self, config: RunConfig, session: LoadedTask, initial: Tensors) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.dataset, self.foundation = session.dataset, models.load(config.model)
        layers = sorted({name.split("/")[1].rpartition(".")[0] for name in initial if name.startswith("expert/")})
        self.module = inject_adapter_in_model(LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=layers), self.foundation.module)
        self.head = nn.Linear(self.foundation.feature_dim, len(self.dataset.classes))
        with torch.no_grad():
            for layer in layers:
                into = self.module.get_submodule(layer)
                into.lora_A["default"].weight.copy_(initial[f"expert/{layer}.lora_a"])
                into.lora_B["default"].weight.copy_(initial[f"expert/{layer}.lora_b"])
            for name, parameter in self.head.named_parameters():
                parameter.copy_(initial[f"head/{name}"])

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(self.foundation.features(self.dataset.inputs.batch(rows)))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(rows), self.dataset.labels[rows])

    def metrics(self, rows: torch.Tensor) -> dict:
        from pfl.metrics import Weighted

        with torch.no_grad():
            return {"accuracy": Weighted(float((self.logits(rows).argmax(1) == self.dataset.labels[rows]).sum()), len(rows))}


def theirs(config: RunConfig) -> dict:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    session = LoadedTask(config, Progress())
    experiment: Experiment = session.experiment(config)
    net = Net(config, session, experiment.method.initial(session.model))
    stage, clients = config.stage1, experiment.clients
    users = FederatedDataset(lambda user: Dataset([clients[user].train.indices], user_id=str(user)),
                             get_user_sampler("minimize_reuse", list(range(len(clients)))))
    model = PyTorchModel(net, partial(torch.optim.AdamW, weight_decay=stage.weight_decay, fused=True),
                         torch.optim.SGD(net.parameters(), lr=1.0))
    trained = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == sum(t.numel() for n, t in experiment.method.initial(session.model).items()
                                        if n.startswith(("expert/", "head/")))
    ends: list[float] = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            ends.append(time.perf_counter())
            return False, Metrics()

    with redirect_stdout(StringIO()):       # pfl prints every round's metrics
        FederatedAveraging().run(
            algorithm_params=NNAlgorithmParams(central_num_iterations=stage.rounds, evaluation_frequency=10**6,
                                               train_cohort_size=len(clients), val_cohort_size=0),
            backend=SimulatedBackend(users, users, [WeightByDatapoints()]), model=model,
            model_train_params=NNTrainHyperParams(local_num_epochs=stage.epochs, local_learning_rate=stage.lr,
                                                  local_batch_size=stage.batch, local_max_grad_norm=stage.clip),
            model_eval_params=NNEvalHyperParams(local_batch_size=64), callbacks=[Clock()])
    with torch.no_grad():
        test = experiment.partition.global_test
        logits = torch.cat([net.logits(rows) for rows in test.split(64)])
    return {"seconds": [0.0, *(b - a for a, b in zip(ends, ends[1:]))],
            "accuracy": accuracy(logits, session.dataset.labels[test])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    if find_spec("pfl") is None:
        sys.exit("pfl is not installed, so there is nothing to compare with; --help says how to install it")
    found: dict[str, list[dict]] = {"fedms": [], "pfl": []}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.seeds):
            config = configuration(options, seed)
            for who, outcome in (("fedms", ours(config, Path(name) / str(seed))), ("pfl", theirs(config))):
                found[who].append(outcome)
                print(f"{who:6} seed {seed}: a round {statistics.median(outcome['seconds'][1:]):.2f} s, accuracy "
                      f"{outcome['accuracy']:.3f}", flush=True)
    ratios = [b / a for mine, other in zip(found["fedms"], found["pfl"])
              for a, b in zip(mine["seconds"][1:], other["seconds"][1:])]
    differences = [mine["accuracy"] - other["accuracy"] for mine, other in zip(found["fedms"], found["pfl"])]
    print(f"pfl {version('pfl')} takes {statistics.median(ratios):.2f} times ours a round ({min(ratios):.2f}-"
          f"{max(ratios):.2f}, {len(ratios)} pairs of rounds); accuracy {statistics.mean(differences):+.3f} for ours (by "
          f"seed: {', '.join(f'{d:+.3f}' for d in differences)})")
    if options.json:
        save(options.json, {**vars(options), "json": str(options.json), **found, "ratios": ratios})


if __name__ == "__main__":
    main()
