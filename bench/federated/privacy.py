"""What privacy costs: `python -m bench.federated.privacy --help`, from the root of the project.

cost    seconds, processor seconds and bytes of a round of secure aggregation beside the same round without it, on the embedded
        engine: runs with [privacy] off and secure in turn, several times; medians of their rounds, and ratios.
curve   accuracy over epsilon for fedavg, ffa_lora (the rule freeze_a) and fedms on 200 simulated clients of digits, mode central. As
        the clients are simulated, their accuracies are read directly here; in a run of real ones they are not released. Each run
        is a line of the file --records; runs that it has are not repeated, so that a curve can be made in pieces.
table   the table of such a file for docs/evidence/privacy.md: mean of the seeds and largest distance from it.
picture the picture of such a file, docs/evidence/img/privacy_curve.svg: means, and bars from the lowest to the highest seed.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedms.config import RunConfig, load_config, registry
from fedms.data.subset import Subset
from fedms.engines.local import LocalEngine
from fedms.federated.evaluation import shared_accuracy
from fedms.privacy.key_file import create_key
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTask, LoadedTasks
from fedms.storage.run_folder import RunFolder

METHODS = ("fedavg", "ffa_lora", "fedms")
CURVE = ("data.max_samples=none", "data.partition=dirichlet", "clients.count=200", "clients.unseen=0", "aggregate.weights=uniform",
         "sal.schedule=fixed", "run.threads=1", "stage1.rounds=4", "stage2.rounds=2", "stage1.epochs=5", "stage2.epochs=5",
         "model.id=vit-digits-pretrained")
COST = ("run.method=fedms", "aggregate.weights=uniform", "sal.schedule=fixed", "run.threads=1", "stage2.rounds=0", "clients.unseen=0",
        "data.global_test=0", "data.partition=iid")


class Rounds(Progress):
    """Keeps what is told of each round, and the processor time since the one before."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.since = time.process_time()

    def round(self, stage: str, round: int, **metrics: Any) -> None:
        now = time.process_time()
        self.rounds.append({**metrics, "processor": now - self.since})
        self.since = now


def train(config: RunConfig, task: LoadedTask | None = None, evaluated: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run all rounds; return accuracies and the noise multiplier, and what was told of each round."""
    told = Rounds()
    task = task or LoadedTask(config, told)
    experiment = task.experiment(config)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", config)
        common = Subset(experiment.partition.global_test)
        engine = LocalEngine(experiment.method, experiment.server, task.model, experiment.clients, common, folder, told)
        task.model.start()
        state = engine.run(experiment.method.initial(task.model))
        found: dict[str, Any] = {}
        if evaluated:
            final = engine.final_message(state)
            own = [each.record["accuracy"]["personalized"] for each in engine.evaluate(final, False) if each.record["n_test"]]
            found = {"shared": shared_accuracy(experiment.method, task.model, common, final), "personalized": statistics.fmean(own)}
        folder.close()
    private = config.privacy.mode != "off"
    return {**found, "noise": experiment.server.noise.update if private else None}, told.rounds


def cost(key: Path, clients: Sequence[int], model: str, repeats: int, rounds: int) -> None:
    """Print a line for each number of clients: seconds, processor seconds and bytes of a round, without and with secure sums."""
    for count in clients:
        ratios, seconds, traffic = [], {"off": [], "secure": []}, {}
        processor: dict[str, list[float]] = {"off": [], "secure": []}
        for _ in range(repeats):
            for mode in ("off", "secure"):
                config = load_config(model, [*COST, f"clients.count={count}", f"stage1.rounds={rounds}", f"privacy.key={key}",
                                             f"privacy.mode={mode}"])
                _, told = train(config, evaluated=False)
                seconds[mode].append(statistics.median(line["seconds"] for line in told[1:]))      # the first one builds constants
                processor[mode] += [line["processor"] for line in told[1:]]
                traffic[mode] = sum(told[-1][name] for name in ("bytes_up", "bytes_down"))
            ratios.append(seconds["secure"][-1] / seconds["off"][-1])
        print(json.dumps({"run file": model, "clients": count, **{f"seconds {m}": statistics.median(s) for m, s in seconds.items()},
                          "time ratio": statistics.median(ratios), **{f"processor {m}": statistics.median(s) for m, s in processor.items()},
                          "processor ratio": statistics.median(processor["secure"]) / statistics.median(processor["off"]),
                          **{f"bytes {m}": b for m, b in traffic.items()}, "bytes ratio": traffic["secure"] / traffic["off"]}), flush=True)


def curve(key: Path, epsilons: Sequence[str], seeds: Sequence[int], methods: Sequence[str], records: Path) -> None:
    """Train each method with each budget and seed, and append a line to the file of records; runs that it has are left out."""
    tasks = LoadedTasks()
    done = {(line["method"], line["epsilon"], line["seed"]) for line in read_lines(records)}
    for seed in seeds:
        for epsilon in epsilons:
            for method in methods:
                if (method, epsilon, seed) in done:
                    continue
                private = [] if epsilon == "off" else ["privacy.mode=central", f"privacy.epsilon={epsilon}", f"privacy.key={key}"]
                config = load_config("digits", [*CURVE, *private, f"run.method={method}", f"run.seed={seed}"])
                found, _ = train(config, tasks.of(config, Progress()))
                with open(records, "a") as file:
                    file.write(json.dumps({"method": method, "epsilon": epsilon, "seed": seed, **found}) + "\n")
                done.add((method, epsilon, seed))


def read_lines(records: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of records; none if there is no such file."""
    return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []


def table(records: Path) -> str:
    """Return a table in Markdown with a row for each method and budget, the largest budget first."""
    lines = read_lines(records)
    rows = sorted({(line["method"], line["epsilon"]) for line in lines},
                  key=lambda row: (row[0], -float("inf" if row[1] == "off" else row[1])))
    out = ["| method | epsilon | noise multiplier | common test | mean of the clients | seeds |", "| --- | --- | --- | --- | --- | --- |"]
    for method, epsilon in rows:
        runs = [line for line in lines if (line["method"], line["epsilon"]) == (method, epsilon)]
        noise = "" if epsilon == "off" else f"{runs[0]['noise']:.3g}"
        out.append(f"| {method} | {'without noise' if epsilon == 'off' else epsilon} | {noise} | {spread(runs, 'shared')} | "
                   f"{spread(runs, 'personalized')} | {len(runs)} |")
    return "\n".join(out) + "\n"


def picture(records: Path, path: Path) -> None:
    """Accuracy over epsilon, a line for each method; what it is without noise as a dashed line."""
    import matplotlib
    from matplotlib.figure import Figure

    lines, rows = read_lines(records), registry.methods()
    with matplotlib.rc_context({"svg.hashsalt": "fedms"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        titles = {"shared": "common test", "personalized": "mean of the clients"}
        for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
            for method, marker in zip(dict.fromkeys(line["method"] for line in lines), "os^"):
                found: dict[str, list[float]] = {}
                for line in lines:
                    if line["method"] == method:
                        found.setdefault(line["epsilon"], []).append(100 * line[name])
                without, color = found.pop("off", None), rows[method].color
                x = sorted(found, key=float)
                means = [statistics.fmean(found[epsilon]) for epsilon in x]
                ends = [[mean - min(found[e]) for e, mean in zip(x, means)], [max(found[e]) - mean for e, mean in zip(x, means)]]
                axes.errorbar([float(e) for e in x], means, ends, color=color, marker=marker, capsize=3, label=method)
                if without:
                    axes.axhline(statistics.fmean(without), color=color, linestyle="--", linewidth=1)
            axes.set(xscale="log", xlabel="epsilon of the run", title=title)
            ticks = sorted({float(line["epsilon"]) for line in lines if line["epsilon"] != "off"})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        figure.axes[0].set_ylabel("accuracy, %")
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def spread(runs: Sequence[dict[str, Any]], name: str) -> str:
    """Return the mean of an accuracy over seeds, in percent, and the largest distance from it."""
    values = [100 * run[name] for run in runs]
    mean = statistics.fmean(values)
    return f"{mean:.1f} % ± {max(abs(value - mean) for value in values):.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "curve", "table", "picture"))
    parser.add_argument("--clients", default="16,100", help="cost: numbers of clients (16,100)")
    parser.add_argument("--run-file", default="digits", help="cost: run file (digits)")
    parser.add_argument("--repeats", type=int, default=3, help="cost: runs of each mode, in turn (3)")
    parser.add_argument("--rounds", type=int, default=3, help="cost: rounds of a run, of which the first is left out (3)")
    parser.add_argument("--epsilons", default="off,16,8,4,2", help="curve: budgets (off,16,8,4,2)")
    parser.add_argument("--seeds", default="0,1,2", help="curve: seeds (0,1,2)")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"curve: methods ({','.join(METHODS)})")
    parser.add_argument("--records", type=Path, default=Path("bench/results/privacy_curve.jsonl"), help="curve, table, picture: the file")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print(table(arguments.records), end="")
        return 0
    if arguments.what == "picture":
        picture(arguments.records, Path("docs/evidence/img/privacy_curve.svg"))
        return 0
    with tempfile.TemporaryDirectory() as place:
        key = Path(place) / "privacy.key"
        create_key(key, bytes(range(32)))
        if arguments.what == "cost":
            cost(key, [int(n) for n in arguments.clients.split(",")], arguments.run_file, arguments.repeats, arguments.rounds)
        else:
            curve(key, arguments.epsilons.split(","), [int(n) for n in arguments.seeds.split(",")], arguments.methods.split(","),
                  arguments.records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
