"""One data set divided among clients on paper: what clients with data of their own would have."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedms import data
from fedms.config import RunConfig
from fedms.progress import Progress
from fedms.runs.experiment import LoadedTask


def write_shards(config: RunConfig, folder: Path, progress: Progress) -> RunConfig:
    """Divide a run's data: `folder/client-N` gets what client N has, `folder/server` what no client has, and all get the common
    test set. Returns the configuration with the number of clients set."""
    task = LoadedTask(config, progress)
    experiment = task.experiment(config)
    config = experiment.config
    progress.phase(f"dividing the data among {config.clients.count} clients")
    parts = {f"client-{split.id}": replace(experiment.partition, clients=(split,), unseen=(), notes=())
             for split in experiment.partition.clients}
    for name, part in {"server": replace(experiment.partition, clients=()), **parts}.items():
        data.write_shard(folder / name, data.shard_of(task.dataset, part, experiment.fitting.depths))
    if config.privacy.masks:
        from fedms.federated.private_client import member_of_run
        from fedms.privacy.key_file import create_key
        from fedms.privacy.member_file import KEY, Agreement, digest_of, write_agreement

        for split in experiment.partition.clients:
            member = member_of_run(experiment.server.key, split.id, config.clients.count)
            create_key(folder / f"client-{split.id}" / KEY, member.secret)
            write_agreement(folder / f"client-{split.id}", Agreement(digest_of(config), member.identities))
    return config
