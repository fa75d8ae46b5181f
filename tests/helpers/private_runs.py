"""Small runs of digits with privacy, and their key."""
from __future__ import annotations

from pathlib import Path

from fedms.config import RunConfig, load_config
from fedms.privacy.key_file import create_key

COUNT = 4
SETS = ["run.method=fedms", "data.max_samples=160", f"clients.count={COUNT}", "clients.unseen=0", "data.partition=iid", "run.threads=1",
        "sal.schedule=fixed", "aggregate.weights=uniform"]
MODES = {"central": ["privacy.mode=central", "privacy.noise=0.5", "privacy.score_noise=5"],
         "secure": ["privacy.mode=secure"],
         "distributed": ["privacy.mode=distributed", "privacy.noise=0.5", "privacy.score_noise=5"]}


def new_key(folder: Path) -> Path:
    """Write a secret key, the same one every time, and return its path."""
    path = folder / "privacy.key"
    create_key(path, b"a key these tests have all alone")
    return path


def configuration(key: Path, *sets: str) -> RunConfig:
    """Return the configuration of a run whose secret key is at `key`; later settings win over earlier ones."""
    return load_config("digits", [*SETS, f"privacy.key={key}", *sets])
