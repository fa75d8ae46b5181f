"""Whether progressive activation costs accuracy: runs of the same task whose schedules differ, beside each other.

    fedms compare fashion --methods fedms --seeds 3 --out runs/progressive
    fedms compare fashion --methods fedms --seeds 3 --out runs/all --set sal.schedule=all
    python -m bench.federated.schedules runs/progressive runs/all --figure schedules.svg

On models of 12 and of 30 blocks, with depths that grow in the middle of a run:

    SETS="--set run.threads=1 --set clients.unseen=0 --set stage2.rounds=0 --set sal.every=2"
    VISION="--set model.id=vit-small --set data.max_samples=400 --set data.split=[0.35,0.15,0.5] --set clients.count=8"
    VISION="$VISION --set stage1.rounds=8 --set stage1.lr=2e-3 --set stage1.batch=8"
    EVERY="--set sal.schedule=every --set sal.step=3"
    fedms compare fashion --methods fedavg_prior $SETS $VISION $EVERY --out runs/progressive12
    fedms compare fashion --methods fedavg_prior $SETS $VISION $EVERY --set sal.max_depth=8 --out runs/eight12
    fedms compare fashion --methods fedavg_prior $SETS $VISION $EVERY --set sal.cache_ahead=false --out runs/anew12
    fedms compare fashion --methods fedavg_prior $SETS $VISION --set sal.schedule=all --out runs/all12
    python -m bench.federated.schedules runs/progressive12 runs/eight12 runs/anew12 runs/all12

    LANGUAGE="--set data.max_samples=144 --set stage1.rounds=8"
    EVERY="--set sal.schedule=every --set sal.depth=1 --set sal.step=7"
    fedms compare dictionaries --methods fedavg $SETS $LANGUAGE $EVERY --out runs/progressive30
    fedms compare dictionaries --methods fedavg $SETS $LANGUAGE --set sal.schedule=all --out runs/all30
    python -m bench.federated.schedules runs/progressive30 runs/all30

The first run grows by three blocks to ten, at the depths 1, 4, 7 and 10; the second one stops at eight; the third one computes
what is constant anew whenever the depth has grown. The language model grows by seven, to 22.

Accuracies are the clients' personalized test accuracies; operations are all that the clients did in training. Both are
compared with the last folder's, seed by seed. The picture shows validation accuracy over operations.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from fedms.report.figures import accuracy_over_flops_figure
from fedms.report.numbers import Stat, read_runs
from fedms.storage.records import RunRecords


def runs_of(folder: Path) -> dict[int, RunRecords]:
    """By seed, under the folder's name in place of the method's."""
    found, _ = read_runs(folder)
    for run in found:
        run.config["run"]["method"] = folder.name
    return {run.seed: run for run in found if run.summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of `fedms compare` with one method")
    parser.add_argument("--figure", type=Path, help="a picture to write")
    arguments = parser.parse_args()
    runs = {folder.name: runs_of(folder) for folder in arguments.folders}
    base = runs[arguments.folders[-1].name]

    def accuracy(run: RunRecords) -> float:
        return 100 * run.summary["personalized_accuracy"]["mean"]

    print("| schedule | seeds | personalized, % | points over the last | TFLOP | of the last's | depth at the end |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in runs.items():
        seeds = sorted(found.keys() & base.keys())
        value = Stat.of(accuracy(found[seed]) for seed in seeds)
        gain = Stat.of(accuracy(found[seed]) - accuracy(base[seed]) for seed in seeds)
        flops, share = (statistics.fmean(found[s].summary["flops"] / by(s) for s in seeds)
                        for by in (lambda s: 1e12, lambda s: base[s].summary["flops"]))
        depths = ", ".join(str(found[seed].summary["final_depth"]["stage1"]) for seed in seeds)
        print(f"| {name} | {', '.join(map(str, seeds))} | {value.mean:.1f} ± {value.std or 0:.1f} "
              f"| {gain.mean:+.2f} ± {gain.std or 0:.2f} | {flops:.3g} | {share:.2f} | {depths} |")
    if arguments.figure:
        figure = accuracy_over_flops_figure([run for found in runs.values() for run in found.values()])
        figure.savefig(arguments.figure, bbox_inches="tight")


if __name__ == "__main__":
    main()
