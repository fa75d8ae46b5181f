"""What is known of methods, data sets and models before any of them is imported: a row each, without torch.

The rows of this package are in `catalogue`. Other packages add theirs by `register_method`, `register_data` and
`register_model`, in a module that every process of a run finds: one that an entry point of the group "fedms.plugins" names,
or one that the environment variable FEDMS_PLUGINS names (several with commas between them).
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from fedms.config.table import Table
from fedms.errors import ConfigError

if TYPE_CHECKING:
    from fedms.config.run_config import RunConfig

GROUP, VARIABLE = "fedms.plugins", "FEDMS_PLUGINS"
Target = str | Callable[..., Any]
Content = Literal["text", "images", "conversations"]


@dataclass(frozen=True)
class Constant:
    """What `fedms tune` chooses: a key of the run file and its range; the lowest value is tried as often as the highest.

    log: whether values are spread evenly in the logarithm. integer: whether they are whole numbers.
    """

    key: str
    low: float
    high: float
    log: bool = True
    integer: bool = False

    def at(self, share: float) -> float | int:
        """The value at a share in [0, 1) of the range, to three significant digits."""
        if self.integer:
            return int(self.low + share * (self.high - self.low + 1))
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.3g}")


def no_problems(config: RunConfig) -> Iterable[str]:
    """The check of a method that runs with every run file."""
    return ()


@dataclass(frozen=True)
class Row:
    """name: what run files call it. target: what makes it, as "module:name" or the object itself.
    summary: one line that says what it is."""

    name: str
    target: Target
    summary: str

    def load(self) -> Any:
        """The target, imported now."""
        return load_object(self.target)


@dataclass(frozen=True)
class MethodRow(Row):
    """A federated method. Its target is a class that answers `fedms.federated.method.Method`.

    trained, sent:     what a client trains and what it sends, in a few words for the documentation.
    settings, table:   the class of its own table in a run file and that table's name; None without one.
    tuned:             the constants of its own that `fedms tune` chooses, beside both learning rates.
    aggregation:       the aggregation rule that makes the method what it is; None if `[aggregate] rule` may be any.
    needs_linear_head: whether each client trains a head of its own.
    two_stages:        whether stage 2 trains something else than stage 1. A method without stages keeps its depth there.
    trains_gate:       whether experts are mixed by a trained gate.
    sends_counts:      whether clients send how many samples of each class they have, which the server adds up.
    not_for_tokens:    why the method cannot train causal language models; None if it can.
    check:             what it asks of the rest of a run file: a line for each problem, starting with the key to change.
    color:             of its curves, as #rrggbb; None: one is chosen by its name.
    """

    trained: str = ""
    sent: str = ""
    settings: type[Table] | None = None
    table: str = ""
    tuned: tuple[Constant, ...] = ()
    aggregation: str | None = None
    needs_linear_head: bool = False
    two_stages: bool = False
    trains_gate: bool = False
    sends_counts: bool = False
    not_for_tokens: str | None = None
    check: Callable[[RunConfig], Iterable[str]] = no_problems
    color: str | None = None


@dataclass(frozen=True)
class DataRow(Row):
    """A data set. Its target is called with the run file's [data] table, the loaded model and a seed, and returns a
    `fedms.data.Dataset`.

    holds:       what its samples are.
    has_groups:  whether each sample has a domain, so that the partitions natural and domains are possible.
    public_half: target that returns images to pretrain a model on, (n, 1, H, W) float32 in [0, 1]; called with `data.path`.
    status:      target that returns what `fedms doctor` says: a pair of "ok", "note" or "problem", and a text.
    """

    holds: Content = "text"
    has_groups: bool = False
    public_half: Target | None = None
    status: Target | None = None


@dataclass(frozen=True)
class ModelRow(Row):
    """A foundation model. Its target is called with the run file's [model] table and returns a
    `fedms.models.FoundationModel`.

    reads:      what its samples are.
    text_head:  whether it embeds class prompts, which `model.head = "text"` needs.
    pretrained: whether `fedms pretrain` makes its weights.
    status:     as of `DataRow`.
    """

    reads: Content = "text"
    text_head: bool = False
    pretrained: bool = False
    status: Target | None = None


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Catalogue(Generic[AnyRow]):
    """The rows of one kind by name, in the order in which they were added."""

    kind: str
    rows: dict[str, AnyRow] = field(default_factory=dict)

    def add(self, row: AnyRow) -> None:
        """Adds a row. The same row may be added again.

        Raises:
            ConfigError: if the name is no name, or another row has it.
        """
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", row.name):
            raise ConfigError(f"register {self.kind}: got the name {row.name!r}; accepted: letters, digits, _ and -, a letter "
                              "first")
        if _origin(self.rows.get(row.name, row)) != _origin(row):
            raise ConfigError(f"register {self.kind}: {row.name} is registered already, as {_origin(self.rows[row.name])}; "
                              "choose another name")
        self.rows[row.name] = row

    def all(self) -> dict[str, AnyRow]:
        """All rows, those of plugins too."""
        load_plugins()
        return self.rows


METHODS: Catalogue[MethodRow] = Catalogue("method")
DATA: Catalogue[DataRow] = Catalogue("data set")
MODELS: Catalogue[ModelRow] = Catalogue("model")


def methods() -> dict[str, MethodRow]:
    """The rows of all methods by name."""
    return METHODS.all()


def data_sets() -> dict[str, DataRow]:
    """The rows of all data sets by name; data of one's own have none."""
    return DATA.all()


def models() -> dict[str, ModelRow]:
    """The rows of all models by name; a folder or a hub id has none."""
    return MODELS.all()


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, built in and registered, in the order of the catalog."""
    return tuple(methods())


def pretrained_models() -> tuple[str, ...]:
    """Names of the models whose weights `fedms pretrain` makes."""
    return tuple(name for name, row in models().items() if row.pretrained)


def settings_tables() -> dict[str, type[Table]]:
    """The classes of the methods' own tables by the tables' names."""
    return {row.table: row.settings for row in methods().values() if row.settings is not None}


def method_of_table(table: str) -> str | None:
    """The method whose own table this is; None for a table that every run has."""
    return next((row.name for row in methods().values() if row.settings is not None and row.table == table), None)


def register_method(name: str, target: Target, summary: str = "", **known: Any) -> None:
    """Adds a federated method: from now on run files, `--methods`, tuning and reports know its name.

    Args:
        name: what run files call it.
        target: the class, a `fedms.Method`, or where it is: "module:Class", imported when a run starts.
        summary: one line that says what it is.
        known: further fields of `MethodRow`, such as `settings`, a subclass of `fedms.Table` with the method's own keys, and
            `tuned`, `fedms.Constant`s to choose.

    Raises:
        ConfigError: if another method, or a table of the run file, has this name.
    """
    from fedms.config.run_config import RunConfig

    row = MethodRow(name, target, summary, **{"table": name, **known})
    if row.settings is not None and row.table in RunConfig.model_fields:
        raise ConfigError(f"register method: {name} has a table [{row.table}], which every run file has; choose another name")
    METHODS.add(row)


def register_data(name: str, target: Target, summary: str = "", **known: Any) -> None:
    """Adds a data set that run files can name in `data.name`.

    Args:
        target: a function, or "module:function", that is called with the run file's [data] table, the loaded model and a seed
            and returns a `fedms.data.Dataset`.
        known: further fields of `DataRow`; `holds` is "text", "images" or "conversations".

    Raises:
        ConfigError: if another data set has this name.
    """
    DATA.add(DataRow(name, target, summary, **known))


def register_model(name: str, target: Target, summary: str = "", **known: Any) -> None:
    """Adds a foundation model that run files can name in `model.id`.

    Args:
        target: a function, or "module:function", that is called with the run file's [model] table and returns a
            `fedms.models.FoundationModel`, such as a `fedms.ModuleModel`.
        known: further fields of `ModelRow`; `reads` is "text", "images" or "conversations".

    Raises:
        ConfigError: if another model has this name.
    """
    MODELS.add(ModelRow(name, target, summary, **known))


def load_object(target: Target) -> Any:
    """What "module:name" names; anything else is the object itself.

    Raises:
        ConfigError: if it cannot be imported.
    """
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"{target}: cannot be imported: {error}; expected module:name") from error


_loaded: set[str] = set()       # plugins, by what names them


def load_plugins() -> None:
    """Imports the modules that other packages register their rows in, each once in a process.

    Raises:
        ConfigError: naming the plugin that cannot be imported, and why.
    """
    if "entry points" not in _loaded:
        _loaded.add("entry points")
        for entry in metadata.entry_points(group=GROUP):
            _import_plugin(entry.value, f"entry point {entry.name} of the group {GROUP}")
    for module in filter(None, os.environ.get(VARIABLE, "").split(",")):
        _import_plugin(module.strip(), f"environment variable {VARIABLE}")


def _import_plugin(module: str, named_by: str) -> None:
    if module in _loaded:
        return
    _loaded.add(module)
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"plugin {module}, named by the {named_by}, cannot be imported: {type(error).__name__}: "
                          f"{error}") from error


def _origin(row: Row) -> str:
    """Where a row's target is defined. A script's own module has another name in the processes that it starts."""
    target = row.target
    return target if isinstance(target, str) else f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', target)}"
