"""A whole mixture as a folder: written by `fedms export`, read by `fedms.load(DIR, client=7)` and `fedms predict`."""
from __future__ import annotations

import csv
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedms import models
from fedms.config import RunConfig, config_from_dict, registry, upgraded
from fedms.data import user_data
from fedms.data.samples import Samples, normal
from fedms.errors import ConfigError, DataError, ModelError, RunFolderError
from fedms.exports.manifest import CLIENTS, Manifest, clients_in, read_manifest, save_tensors, write_manifest
from fedms.exports.predict import bind, predict
from fedms.exports.trained_run import Task, TrainedRun, check_fingerprint, message_of
from fedms.federated.client import Private
from fedms.foreign import printable, read_regular, read_tensors
from fedms.models import FoundationModel
from fedms.storage.durable import write_durably
from fedms.storage.final import SHARED, SharedTensors
from fedms.tensors import Tensors

if TYPE_CHECKING:
    import pandas as pd

    from fedms.exports.language_model import LanguageModel

Columns = Mapping[str, Any]     # the columns of a table by name: sequences or arrays, all of the same length


def write(folder: Path, trained: TrainedRun, foundation: FoundationModel) -> None:
    """Write everything that a run trained, and its foundation model, into an empty folder.

    Args:
        folder: The folder.
        trained: What the run trained.
        foundation: Its foundation model; experts are attached to it. One that cannot be saved is only named.
    """
    task, final = trained.task, trained.final
    model_keys: dict[str, Any] = {}
    try:
        foundation.save(folder / "base")        # before experts are attached
        model_keys = {"id": "base", "pooling": getattr(foundation, "pooling", "auto"),
                      "blocks": foundation.blocks}
    except ModelError:
        if task.config.model.id not in registry.models():
            model_keys = {"id": foundation.name}    # given as an object then, and to be given again
    model = bind(foundation, task)
    start = {name: tensor for name, tensor in model.imported.items() if name not in final.tensors}
    shared = SharedTensors(final.stage, final.round, final.depth, final.applied_depth, final.tensors,
                           {**start, **final.constants}, final.statistics)
    save_tensors(shared.groups(), folder / SHARED)
    for number, private in trained.private.items():
        if private.tensors:
            (folder / CLIENTS).mkdir(mode=0o700, exist_ok=True)
            kept = {name: tensor for name, tensor in private.tensors.items() if not name.startswith("optimizer/")}
            save_tensors(kept, folder / CLIENTS / f"{number}.safetensors", private=True)
    write_manifest(folder, "mixture", task, model=model_keys, elsewhere=sorted(trained.elsewhere),
                   final={"stage": final.stage, "round": final.round, "depth": final.depth,
                          "applied_depth": final.applied_depth})


class Mixture:
    """The global expert, one client's local expert, and the gate that mixes them, on the foundation model.

    Several threads may call it at once; predictions are made one after the other.

    Args:
        foundation: The foundation model; experts are attached to it.
        trained: What the run trained.
        client: Id of the client, or None for the global expert alone.
        device: Where it computes, as in `[run] device`.

    Attributes:
        client: The same.
        classes: Names of the classes.
    """

    def __init__(self, foundation: FoundationModel, trained: TrainedRun, client: int | None, device: str = "auto") -> None:
        self.model, self.trained, self.client = bind(foundation, trained.task, device), trained, client
        self.classes = trained.task.classes
        self._language: LanguageModel | None = None
        self._alone = threading.Lock()   # a prediction switches the model between its experts

    def predict(self, samples: Sequence[Any]) -> pd.DataFrame:
        """Predict the class of each sample, or answer it with a causal language model.

        Args:
            samples: Texts; or images as PIL images, paths, or the bytes of their files.

        Returns:
            A row for each sample: `label`, its `probability` in [0, 1], and `gate_weight`, the gate's weight of the local
            expert in [0, 1] (missing where there is no mixture). Of a language model: the `answer`, made of the most probable
            tokens; `log_p`, the sum of their log-probabilities in nats; and the mean `gate_weight`.

        Raises:
            DataError: If samples are no text, or cannot be read as images; the message names them.
        """
        import pandas as pd

        return pd.DataFrame(self._columns(samples, [f"sample {i}" for i in range(len(samples))]))

    def generate(self, messages: str | Sequence[Mapping[str, str]], **sampling: Any) -> str:
        """Answer a question, or a conversation, with a causal language model, as the client.

        Args:
            messages: A question, or messages with a role and a content, the last of which is to be answered.
            sampling: `max_new_tokens`, `temperature`, `top_p` and `seed`; see :class:`fedms.models.generation.Sampling`.

        Returns:
            The text of the answer.

        Raises:
            ConfigError: If the run learned classes, or its method shares no expert and there is no client.
            ValueError: If a setting is out of its range, or the prompt leaves no room for an answer.
        """
        from fedms.models.generation import Sampling

        return self._language_model().answer(messages, self.client, Sampling(**sampling)).text

    def _language_model(self) -> LanguageModel:
        from fedms.exports.language_model import LanguageModel

        if self._language is None:
            self._language = LanguageModel(self.model, self.trained)
        return self._language

    def predict_file(self, source: str, columns: Mapping[str, str | None] = {}) -> pd.DataFrame:
        """Predict the class of each sample in a table, an image, or a folder of either.

        Args:
            source: The file or folder.
            columns: How a table is to be read: names of its columns `text` or `image`, its `delimiter`, `encoding` and
                `quoting`; None or missing: as in the run.

        Returns:
            Every column of the table, and after them what :meth:`predict` returns. One of these whose name the table has
            already is named `predicted_NAME`. Images have a column `image` that says which file or row it is.

        Raises:
            ConfigError: If a delimiter, encoding or quoting is none.
            DataError: If samples cannot be read.
        """
        import pandas as pd

        return pd.DataFrame(self.columns_of_file(source, columns))

    def columns_of_file(self, source: str, columns: Mapping[str, str | None] = {}) -> Columns:
        """Return the columns of :meth:`predict_file` by name, without pandas, which the clients of a federation need not have."""
        reads, samples = self._read(source, {key: value for key, value in columns.items() if value is not None})
        found, table = self._columns(samples.content, samples.places), samples.columns
        if table is None or reads != "text":
            named = [str(item) if isinstance(item, Path) else place for item, place in zip(samples.content, samples.places)]
            column = normal(columns.get("image") or self.trained.task.config.data.image)
            table = {"image": named, **{name: cells for name, cells in (table or {}).items() if name not in ("image", column)}}
        return {**table, **{f"predicted_{name}" if name in table else name: cells for name, cells in found.items()}}

    def _read(self, source: str, columns: Mapping[str, str]) -> tuple[str, Samples]:
        """Read the samples of a file. Return what they are, "text" or "images", and the samples."""
        data, reads = self.trained.task.config.data, self.model.foundation.reads
        config_from_dict({"data": {"name": "./table.csv", **columns}})      # refuses what no run file may say
        data = data.model_copy(update={**columns, "name": source})
        if reads == "conversations":        # what is asked is a text
            data = data.model_copy(update={"text": columns.get("text") or data.question or data.text})
            reads = "text"
        return reads, user_data.read(data, reads, labeled=False)

    def _columns(self, samples: Sequence[Any], places: Sequence[str]) -> Columns:
        if self.model.task.per_token:
            answers = [self._language_model().answer(question, self.client) for question in samples]
            return {"answer": [a.text for a in answers], "log_p": [a.log_p for a in answers],
                    "gate_weight": [a.gate_weight for a in answers]}
        if not len(samples):
            return {"label": [], "probability": [], "gate_weight": []}
        max_tokens = self.trained.task.config.data.max_tokens
        inputs = user_data.inputs_of(samples, places, self.model.foundation, "samples", max_tokens)
        with self._alone:
            found = predict(self.model, self.trained, self.client, inputs)
        best = found.personalized.softmax(1).cpu().max(1)
        return {"label": [self.classes[i] for i in best.indices.tolist()], "probability": best.values.numpy(),
                "gate_weight": [None] * len(samples) if found.weights is None else found.weights[:, 1].detach().cpu().numpy()}


def load(folder: str | Path, client: str | int | None = None, *, foundation: FoundationModel | None = None,
         trust_remote_code: bool = False, device: str = "auto") -> Mixture:
    """Load a mixture that `fedms export --format mixture` wrote, ready to predict.

    Sizes and hashes of its files are checked, and no code in it is run, whatever it says, unless you say so.

    Args:
        folder: The exported folder.
        client: Id or group of the client whose local expert is used; None for the global expert alone.
        foundation: The foundation model, if the run was given it as an object.
        trust_remote_code: Run the Python code that came with the foundation model, where it needs some.
        device: Where it computes: "auto" for the first CUDA GPU that works, else the CPU; "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        RunFolderError: If the folder is no mixture, or one of its files is damaged.
        ConfigError: If there is no such client.
        ModelError: If the model cannot be loaded, or is not the one of the run.
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
    final = message_of(SharedTensors.of(_tensors(folder / SHARED), **content.final.model_dump()))
    private = {number: Private(_tensors(path)) for number, path in sorted(clients_in(folder, content).items())}
    trained = TrainedRun(task, final, private, frozenset(content.elsewhere))
    number = trained.client(client)     # a mistake here is answered before the model is loaded
    foundation = foundation or models.load(config.model, config.task.kind)
    check_fingerprint(foundation, task)
    try:
        return Mixture(foundation, trained, number, device)
    except (KeyError, RuntimeError) as error:
        raise RunFolderError(f"{folder}: its tensors do not fit its model: {error}; export it again") from None


def _config(folder: Path, content: Manifest, given: bool, trust_remote_code: bool) -> RunConfig:
    """Return the run's configuration without what a stranger's file must not choose: code, and files outside of the folder.

    Args:
        folder: The exported folder.
        content: Its manifest.
        given: Whether the model is at hand as an object.
        trust_remote_code: Whether the user lets the model run code.
    """
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
    elif content.model.id is None and config.model.id not in registry.models():
        raise RunFolderError(f"{folder}: names the model {printable(config.model.id)!r}, which neither lies in it nor is "
                             f"built in ({', '.join(registry.models())}); export it again")
    return config.model_copy(update={"model": config.model.model_copy(update=table),
                                     "lora": config.lora.model_copy(update={"start": None})})


def _tensors(path: Path) -> Tensors:
    try:
        return read_tensors(read_regular(path))[0]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: {error}; export it again") from None


def csv_of(table: Columns) -> str:
    """Return columns as CSV with a header. Cells without a value are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values()))
    return out.getvalue()


def write_table(table: Columns, path: Path) -> None:
    """Write columns as .csv or .parquet; the file is either written completely or not at all.

    Raises:
        DataError: If a column holds values of several kinds, which a .parquet file does not allow.
        RunFolderError: If the file cannot be written.
    """
    if path.suffix == ".csv":
        data = csv_of(table).encode()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        try:
            pq.write_table(pa.table(dict(table)), buffer)
        except pa.ArrowException as error:      # a column of a .jsonl file may hold texts and numbers
            raise DataError(f"{path}: a column cannot be written as Parquet: {error}; write a .csv instead") from None
        data = buffer.getvalue()
    try:
        write_durably(path, data)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
