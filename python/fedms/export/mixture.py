"""An exported mixture, loaded: `fedms.load(DIR, client=7).predict(texts)`, and `fedms predict`."""
from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedms import models
from fedms.config import ConfigError, RunConfig, config_from_dict, upgraded
from fedms.data import user_data
from fedms.export import check_fingerprint
from fedms.export.manifest import Manifest, clients_in, read_manifest
from fedms.export.trained_run import Task, TrainedRun, bind, predict
from fedms.federated.client import Message, Private
from fedms.foreign import printable, read_regular, read_tensors
from fedms.models import FoundationModel
from fedms.storage.durable import write_durably
from fedms.storage.records import RunFolderError
from fedms.tensors import Tensors

if TYPE_CHECKING:
    import pandas as pd

SHARED = "shared.safetensors"


class Mixture:
    """The global expert, one client's local expert, and the gate, on the foundation model.

    client:  id, or None: the global expert alone.
    classes: class names.
    """

    def __init__(self, foundation: FoundationModel, outcome: TrainedRun, client: int | None) -> None:
        self.model, self.outcome, self.client = bind(foundation, outcome.task), outcome, client
        self.classes = outcome.task.classes
        self._alone = threading.Lock()   # a prediction switches the model between its experts

    def predict(self, samples: Sequence[Any]) -> pd.DataFrame:
        """A row a sample: `label`, its `probability`, and `gate_weight`, the gate's weight of the local expert (missing
        where there is no mixture).

        Args:
            samples: texts; or images as PIL images, paths, or the bytes of their files.

        Raises:
            DataError: naming the samples that are no text, or cannot be read as images.
        """
        return self._table(samples, [f"sample {i}" for i in range(len(samples))])

    def _table(self, samples: Sequence[Any], places: Sequence[str]) -> pd.DataFrame:
        import pandas as pd

        if not len(samples):
            return pd.DataFrame({"label": [], "probability": [], "gate_weight": []})
        max_tokens = self.outcome.task.config.data.max_tokens
        inputs = user_data.inputs_of(samples, places, self.model.foundation, "samples", max_tokens)
        with self._alone:
            found = predict(self.model, self.outcome, self.client, inputs)
        best = found.personalized.softmax(1).max(1)
        return pd.DataFrame({"label": [self.classes[i] for i in best.indices.tolist()],
                             "probability": best.values.numpy(),
                             "gate_weight": None if found.weights is None else found.weights[:, 1].detach().numpy()})

    def predict_file(self, source: str, columns: Mapping[str, str | None] = {}) -> pd.DataFrame:
        """`predict` for all samples of a table, an image, or a folder of either; the first column says which.

        columns: names of the columns `text` and `image` of a table; None or missing: as in the run.
        """
        data, reads = self.outcome.task.config.data, self.model.foundation.reads
        data = data.model_copy(update={"name": source, **{k: v for k, v in columns.items() if v is not None}})
        samples = user_data.read(data, reads, labeled=False)
        table = self._table(samples.content, samples.places)
        named = samples.content if reads == "text" else [
            str(item) if isinstance(item, Path) else place for item, place in zip(samples.content, samples.places)]
        table.insert(0, "text" if reads == "text" else "image", named)
        return table


def load(folder: str | Path, client: str | int | None = None, *, foundation: FoundationModel | None = None,
         trust_remote_code: bool = False) -> Mixture:
    """A mixture that `fedms export --format mixture` wrote, ready to predict. Sizes and hashes of its files are checked,
    and no code in it is run, whatever it says, unless you say so.

    Args:
        client: id or group of the client whose local expert is used; None: the global expert alone.
        foundation: the model, where it was given to the run as an object.
        trust_remote_code: run the Python code that came with the foundation model, where it needs some.

    Raises:
        RunFolderError: if the folder is no mixture, or one of its files is damaged.
        ConfigError: if there is no such client.
        ModelError: if the model cannot be loaded, or is not the one of the run.
    """
    folder = Path(folder)
    content = read_manifest(folder)
    if content.kind != "mixture" or content.final is None:
        raise RunFolderError(f"{folder}: is an export in the format {content.kind}, whose README.md or inputs say how it "
                             "is read; `fedms predict` and `fedms.load` read --format mixture")
    config = _config(folder, content, foundation is not None, trust_remote_code)
    task = Task(config, tuple(content.classes), None if content.prompts is None else tuple(map(tuple, content.prompts)),
                {int(i): group for i, group in content.clients.items()}, content.model_fingerprint)
    if SHARED not in content.files:
        raise RunFolderError(f"{folder}: its manifest does not list {SHARED}; export it again")
    shared = _tensors(folder / SHARED)
    parts: dict[str, Any] = {name: _below(key, shared) for name, key in (
        ("tensors", "tensors"), ("constants", "constants"), ("statistics", "sums"))}
    private = {number: Private(_tensors(path)) for number, path in sorted(clients_in(folder, content).items())}
    outcome = TrainedRun(task, Message(clients=(), **content.final.model_dump(), **parts), private,
                      frozenset(content.elsewhere))
    number = outcome.client(client)     # a mistake here is answered before the model is loaded
    foundation = foundation or models.load(config.model, config.task.kind)
    check_fingerprint(foundation, task)
    try:
        return Mixture(foundation, outcome, number)
    except (KeyError, RuntimeError) as error:
        raise RunFolderError(f"{folder}: its tensors do not fit its model: {error}; export it again") from None


def _config(folder: Path, content: Manifest, given: bool, trust_remote_code: bool) -> RunConfig:
    """The run's configuration, without what a stranger's file must not choose: code, and files outside of the folder.

    given: whether the model is at hand as an object."""
    try:
        config = config_from_dict(upgraded(content.config))
    except ConfigError as error:
        raise RunFolderError(f"{folder}: the configuration in it cannot be used: {error}") from None
    table: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if content.model.id == "base":
        table |= {"id": str(folder / "base"), "pooling": content.model.pooling or "auto", "blocks": content.model.blocks}
    elif content.model.id is not None and not given:
        raise ConfigError(f"{folder}: its model {printable(content.model.id)!r} was given as an object; give it again as "
                          "foundation=")
    elif content.model.id is None and config.model.id not in models.MODELS:
        raise RunFolderError(f"{folder}: names the model {printable(config.model.id)!r}, which neither lies in it nor is "
                             f"built in ({', '.join(models.MODELS)}); export it again")
    return config.model_copy(update={"model": config.model.model_copy(update=table),
                                     "lora": config.lora.model_copy(update={"start": None})})


def _tensors(path: Path) -> Tensors:
    try:
        return read_tensors(read_regular(path))[0]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: {error}; export it again") from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a table as .csv or .parquet, whole or not at all.

    Raises:
        RunFolderError: if it cannot be written.
    """
    if path.suffix == ".csv":
        data = table.to_csv(index=False).encode()
    else:
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        data = buffer.getvalue()
    try:
        write_durably(path, data)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
