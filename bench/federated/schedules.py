"""Whether progressive activation costs accuracy: runs of the same task whose schedules differ, beside each other.

    fedms compare fashion --methods fedms --seeds 3 --out runs/progressive
    fedms compare fashion --methods fedms --seeds 3 --out runs/all --set sal.schedule=all
    python -m bench.federated.schedules runs/progressive runs/all --figure schedules.svg

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
