"""Records as pandas frames, for notebooks: one row a round, a visit, a client, a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedms.storage.records import RunRecords, find_runs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Results:
    """The records of one or several runs as pandas frames.

    Every frame has the columns `run` (the folder's name), `method` and `seed`, and then the fields of
    :mod:`fedms.storage.records`, in the units given there. The accuracies of a client and the nested values of a summary are
    columns of their own, such as `accuracy.global`.

    Attributes:
        runs: One row for each run that has ended.
        rounds: One row for each round.
        visits: One row for each visit.
        clients: One row for each client of a run that has ended.
    """

    runs: pd.DataFrame
    rounds: pd.DataFrame
    visits: pd.DataFrame
    clients: pd.DataFrame


def results(path: str | Path) -> Results:
    """Read a run folder, or a folder of run folders, into pandas frames.

    Raises:
        RunFolderError: If there is no run, or one is damaged.
    """
    records = [RunRecords.read(folder) for folder in find_runs(path)]
    return Results(
        runs=_frame(records, lambda run: [run.summary] if run.summary else []),
        rounds=_frame(records, lambda run: run.rounds),
        visits=_frame(records, lambda run: run.visits),
        clients=_frame(records, lambda run: run.clients),
    )


def _frame(records: list[RunRecords], rows: Callable[[RunRecords], list[dict[str, Any]]]) -> pd.DataFrame:
    import pandas as pd

    return pd.json_normalize([
        {"run": run.path.name, "method": run.method, "seed": run.seed, **row} for run in records for row in rows(run)
    ])
