"""What ``fedms doctor`` looks at. Each check is one line with a state; nothing is fetched or written for good."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedms.storage.provenance import processor

if TYPE_CHECKING:
    from fedms.config import RunConfig
    from fedms.progress import Progress
    from fedms_ext.profiling import Served

PACKAGES = ("torch", "numpy", "transformers", "safetensors", "scikit-learn", "flwr-datasets", "pydantic", "matplotlib",
            "jinja2", "tomli-w")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: What was checked.
        state: "ok"; "note" for something worth knowing; "problem" for something that stops runs.
        text: What was found, and what to do about it.
    """

    name: str
    state: Literal["ok", "note", "problem"]
    text: str


def diagnose(run_file: Path | None = None) -> Iterator[Check]:
    """Yield all checks, in the order in which one builds on another.

    Args:
        run_file: A deployment's run file, whose folder is checked too.
    """
    for check in (_python, _packages, _machine, _kernels, _backends, _gpu, _cache, _rows, partial(_certificates, run_file)):
        try:
            yield from check()
        except Exception as error:  # a check that breaks is a finding, and must not hide the others
            name = getattr(check, "__name__", "certificates").strip("_")
            yield Check(name, "problem", f"{type(error).__name__}: {error}")


def served(config: RunConfig, progress: Progress) -> Served:
    """Count which backend computes which products of one training step of a run.

    Counted too is what a visit needs before and after it: the prefix of those samples, and the validation of one.

    Args:
        config: The run file.
        progress: Told of what is being done.

    Raises:
        FedMSError: If the run could not begin.
    """
    from fedms.data import ClientSplit
    from fedms.federated.client import Client, Private
    from fedms.runs.experiment import LoadedTask
    from fedms_ext.profiling import Served

    model, experiment = (session := LoadedTask(config, progress)).model, session.experiment(config)
    split = experiment.partition.clients[0]
    stage = config.stage1.model_copy(update={"epochs": 1})
    client = Client(replace(split, train=split.train[: stage.batch], validation=split.validation[:1]),
                    config.model_copy(update={"stage1": stage}), experiment.fitting)
    message = experiment.server.message(experiment.server.start(experiment.method.initial(model)))
    model.start()
    progress.phase("one training step")
    with Served() as counted:
        experiment.method.client_step(model, client, Private(), message)
    return counted


def _python() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()}, {sys.executable}")
    try:
        yield Check("fedms", "ok", importlib.metadata.version("fedms"))
    except importlib.metadata.PackageNotFoundError:
        yield Check("fedms", "note", f"not installed, used from {Path(__file__).parent}")


def _packages() -> Iterator[Check]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("packages", "problem", f"missing: {', '.join(missing)}; pip install 'fedms[train]'")
    yield Check("packages", "ok", ", ".join(found))


def _machine() -> Iterator[Check]:
    import psutil
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = f", {psutil.virtual_memory().available / 1e9:.1f} GB memory available"
    yield Check("cpu", "ok", f"{processor()}, {usable} cores usable{free}")
    threads = torch.get_num_threads()
    yield Check("threads", "ok" if threads <= usable else "note",
                f"torch uses {threads}; a run sets its own number by the key run.threads")


def _kernels() -> Iterator[Check]:
    import fedms_ext

    info = fedms_ext.build_info()
    yield Check("kernels", "ok", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in info.items()))


def _backends() -> Iterator[Check]:
    from fedms_ext import backends

    for name in backends.known():
        reason = backends.explain(name)
        yield Check(f"backend {name}", "note" if reason else "ok", reason or "available")


def _gpu() -> Iterator[Check]:
    import torch

    from fedms.training.device import describe, self_check

    found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in found:
        reason = self_check(device)
        yield Check("gpu", "problem" if reason else "ok", f"{describe(device)}: " + (
            f"{reason}; runs use another one, or the CPU" if reason else "its kernels compute right"))
    if not found:
        yield Check("gpu", "note", "none seen by torch; runs use the CPU")


def _cache() -> Iterator[Check]:
    from fedms.data import cache_dir

    folder = cache_dir()
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Check("cache", "problem", f"{folder}: cannot be written ({error.strerror}); set FEDMS_CACHE")
    else:
        yield Check("cache", "ok", f"{folder}{'' if existing == folder else ', made when needed'}")


def _rows() -> Iterator[Check]:
    """Every model and data set of the catalogue, as it says of itself."""
    from fedms.config import registry

    for kind, rows in (("model", registry.models()), ("data", registry.data_sets())):
        for row in rows.values():
            if row.status is not None:
                yield _status(f"{kind} {row.name}", registry.load_object(row.status))


def _status(name: str, look: Callable[[], tuple[Any, str]]) -> Check:
    try:
        return Check(name, *look())
    except Exception as error:      # what is missing shows itself in many types
        return Check(name, "problem", str(error))


def _certificates(run_file: Path | None) -> Iterator[Check]:
    """Check the certificates of the deployment that a run file belongs to, if it belongs to one."""
    if run_file is None or not (run_file.parent / "certificates/server.pem").is_file():
        return
    from fedms.engines.flower import certificates

    folder = run_file.parent / "certificates"
    lines, ends = certificates.warnings(folder), certificates.ends(folder)
    for line in lines:
        yield Check("certificates", "problem" if "has expired" in line else "note", line)
    if not lines:
        yield Check("certificates", "ok", ", ".join(f"{name} valid until {end:%Y-%m-%d}" for name, end in ends.items()))
