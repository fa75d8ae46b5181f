"""Six dictionaries by every method, client by client: a table of the runs of `fedms compare dictionaries`.

    fedms compare dictionaries --methods local,fedavg,fedavg_ft,ditto,apfl,fedms,fedms_plus --seeds 3 --jobs 2 \\
        --set run.threads=1 --out runs/dictionaries
    python -m bench.federated.dictionaries runs/dictionaries --records bench/results/dictionaries.csv

Perplexities are exponentials of mean losses in nats a token: over the seeds for a client, over clients and seeds for a method.
The interval of the difference to training alone, or to `--against` METHOD, is that of Student's t over the seeds, because the
clients of a seed share an expert.
"""
from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from fedms.report import Stat
from fedms.storage.records import RunRecords

FIELDS = ("method", "seed", "client", "nats", "tokens", "seconds")
Row = dict[str, str | float]


def rows_of(folder: Path) -> list[Row]:
    """Return one row for each client of each finished run in a folder of `fedms compare`."""
    found: list[Row] = []
    for path in sorted(folder.glob("*-seed*/summary.json")):
        records = RunRecords.read(path.parent)
        method, _, seed = path.parent.name.rpartition("-seed")
        found += [{"method": method, "seed": int(seed), "client": client["group"], "nats": client["language"]["nats"],
                   "tokens": client["language"]["tokens"], "seconds": round(records.summary["seconds"], 1)}
                  for client in records.clients]
    return found


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{**row, "seed": int(row["seed"]), "nats": float(row["nats"]), "seconds": float(row["seconds"])}
                for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row], base: str) -> str:
    """Return the table in Markdown, with every method against the method `base`. Methods stand in the order of their perplexity."""
    clients = list(dict.fromkeys(row["client"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    nats = {(row["method"], row["seed"], row["client"]): float(row["nats"]) for row in rows}
    methods = sorted({row["method"] for row in rows}, key=lambda method: _mean(nats, method, seeds, clients))
    lines = [f"| method | perplexity | against {base} | better clients | {' | '.join(map(str, clients))} |",
             "| --- |" + " ---: |" * (3 + len(clients))]
    for method in methods:
        own = " | ".join(f"{math.exp(_mean(nats, method, seeds, [client])):.1f}" for client in clients)
        overall = math.exp(_mean(nats, method, seeds, clients))
        lines.append(f"| {method} | {overall:.1f} | {_against(nats, method, base, seeds, clients)} | {own} |")
    return "\n".join(lines)


def _mean(nats: dict, method: str, seeds: Sequence, clients: Sequence) -> float:
    return mean(nats[method, seed, client] for seed in seeds for client in clients)


def _against(nats: dict, method: str, base: str, seeds: Sequence, clients: Sequence) -> str:
    """The change of perplexity against a method, in percent with its interval, and how many clients are better off."""
    if method == base:
        return "– | –"
    change = Stat.of(_mean(nats, method, [seed], clients) - _mean(nats, base, [seed], clients) for seed in seeds)
    half = change.interval.half
    percent = [100 * math.expm1(value) for value in (change.mean, change.mean - half, change.mean + half)]
    better = sum(nats[method, seed, client] < nats[base, seed, client] for seed in seeds for client in clients)
    interval = f" ({percent[1]:+.1f} to {percent[2]:+.1f})" if math.isfinite(half) else ""
    return f"{percent[0]:+.1f} %{interval} | {better} of {len(seeds) * len(clients)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of fedms compare, or a file that --records wrote")
    parser.add_argument("--records", type=Path, help="write the records here")
    parser.add_argument("--against", default="local", help="the method that others are compared with")
    asked = parser.parse_args()
    rows = rows_of(asked.source) if asked.source.is_dir() else read(asked.source)
    if asked.records:
        write(asked.records, rows)
    print(table(rows, asked.against))
    seconds = {(row["method"], row["seed"]): float(row["seconds"]) for row in rows}
    for seed in sorted({seed for _, seed in seconds}):
        print(f"seed {seed}: {sum(s for (_, own), s in seconds.items() if own == seed):.0f} s in all runs together")


if __name__ == "__main__":
    main()
