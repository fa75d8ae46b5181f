"""The registry of methods, data sets and models. It holds one row for each and does not import torch.

The rows of this package are in `catalogue`. Other packages add rows with `register_method`, `register_data` and
`register_model`. The module that calls these functions has to be found by every process of a run: name it in an entry point
of the group "fedms.plugins", or in the environment variable FEDMS_PLUGINS (several names are separated by commas).
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
RECOMMENDED = "fedms_plus"      # the method of a run file that names none, and the one that reports speak of first
Target = str | Callable[..., Any]
Content = Literal["text", "images", "conversations"]


@dataclass(frozen=True)
class Constant:
    """A constant that `fedms tune` chooses: a key of the run file and its range.

    Attributes:
        log: Whether values are distributed evenly on a logarithmic scale.
        integer: Whether values are integers.
    """

    key: str
    low: float
    high: float
    log: bool = True
    integer: bool = False

    def at(self, share: float) -> float | int:
        """Return the value at a fraction in [0, 1) of the range, rounded to three significant digits."""
        if self.integer:
            return int(self.low + share * (self.high - self.low + 1))
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.3g}")


def no_problems(config: RunConfig) -> Iterable[str]:
    """Return no problems: the check of a method that accepts every run file."""
    return ()


@dataclass(frozen=True)
class Row:
    """What the registry knows about a method, data set or model.

    Attributes:
        name: Its name in run files.
        target: The object itself, or where to import it from, as "module:name".
        summary: One line that describes it.
    """

    name: str
    target: Target
    summary: str

    def load(self) -> Any:
        """Import and return the target."""
        return load_object(self.target)


@dataclass(frozen=True)
class MethodRow(Row):
    """A federated method. Its target is a subclass of `fedms.Method`.

    Attributes:
        trained, sent: What a client trains and what it sends, in a few words for the documentation.
        settings, table: The class of the method's own table in a run file, and the name of the table; None without one.
        tuned: Constants of the method that `fedms tune` chooses, in addition to both learning rates.
        aggregation: The aggregation rule that the method requires; None if `[aggregate] rule` may be any.
        needs_linear_head: Whether each client trains its own head, which has to be linear.
        two_stages: Whether stage 2 trains something different from stage 1. Otherwise the depth carries over to stage 2.
        weight: Returns the fixed weight in [0, 1] of the local expert in a mixture, None where a gate learns it; None for a method
            whose experts [gate] does not mix.
        sends_counts: Whether clients send their number of samples of each class, to be added up by the server.
        not_for_tokens: Why the method cannot train causal language models; None if it can.
        check: Returns the problems of a run file with this method, one line each, beginning with the key to change.
        color: Color of its curves as #rrggbb; None chooses one by the name.
    """

    trained: str = ""
    sent: str = ""
    settings: type[Table] | None = None
    table: str = ""
    tuned: tuple[Constant, ...] = ()
    aggregation: str | None = None
    needs_linear_head: bool = False
    two_stages: bool = False
    weight: Callable[[RunConfig], float | None] | None = None
    sends_counts: bool = False
    not_for_tokens: str | None = None
    check: Callable[[RunConfig], Iterable[str]] = no_problems
    color: str | None = None


@dataclass(frozen=True)
class DataRow(Row):
    """A data set. Its target is called with the [data] table of the run file, the loaded model and a seed, and returns a
    `fedms.data.Dataset`.

    Attributes:
        holds: What the samples are.
        has_groups: Whether each sample belongs to a domain, which the partitions "natural" and "domains" need.
        public_half: Target that returns images for pretraining a model, (n, 1, H, W) float32 in [0, 1]; called with
            `data.path`.
        status: Target that returns a line of `fedms doctor`: "ok", "note" or "problem", and a text.
    """

    holds: Content = "text"
    has_groups: bool = False
    public_half: Target | None = None
    status: Target | None = None


@dataclass(frozen=True)
class ModelRow(Row):
    """A foundation model. Its target is called with the [model] table of the run file and returns a
    `fedms.models.FoundationModel`.

    Attributes:
        reads: What the samples are.
        text_head: Whether it can embed class prompts, which `model.head = "text"` needs.
        pretrained: Whether `fedms pretrain` makes its weights.
        status: As in `DataRow`.
    """

    reads: Content = "text"
    text_head: bool = False
    pretrained: bool = False
    status: Target | None = None


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Catalogue(Generic[AnyRow]):
    """The rows of one kind, by name, in the order in which they were added."""

    kind: str
    rows: dict[str, AnyRow] = field(default_factory=dict)

    def add(self, row: AnyRow) -> None:
        """Add a row. Adding the same row again has no effect.

        Raises:
            ConfigError: If the name is not valid, or another row has it.
        """
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", row.name):
            raise ConfigError(f"register {self.kind}: got the name {row.name!r}; accepted: letters, digits, _ and -, a letter "
                              "first")
        if _origin(self.rows.get(row.name, row)) != _origin(row):
            raise ConfigError(f"register {self.kind}: {row.name} is registered already, as {_origin(self.rows[row.name])}; "
                              "choose another name")
        self.rows[row.name] = row

    def all(self) -> dict[str, AnyRow]:
        """Return all rows, including those of plugins."""
        load_plugins()
        return self.rows


METHODS: Catalogue[MethodRow] = Catalogue("method")
DATA: Catalogue[DataRow] = Catalogue("data set")
MODELS: Catalogue[ModelRow] = Catalogue("model")


def methods() -> dict[str, MethodRow]:
    """Return the rows of all methods by name."""
    return METHODS.all()


def data_sets() -> dict[str, DataRow]:
    """Return the rows of all registered data sets by name. A user's own data have no row."""
    return DATA.all()


def models() -> dict[str, ModelRow]:
    """Return the rows of all registered models by name. A model from a folder or from the hub has no row."""
    return MODELS.all()


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, built in and registered, in the order of the catalog."""
    return tuple(methods())


def pretrained_models() -> tuple[str, ...]:
    """Return the names of the models whose weights `fedms pretrain` makes."""
    return tuple(name for name, row in models().items() if row.pretrained)


def settings_tables() -> dict[str, type[Table]]:
    """Return the classes of the methods' own tables, by the names of the tables."""
    return {row.table: row.settings for row in methods().values() if row.settings is not None}


def method_of_table(table: str) -> str | None:
    """Return the method to which a table belongs, or None for a table that every run file has."""
    return next((row.name for row in methods().values() if row.settings is not None and row.table == table), None)


def register_method(name: str, target: Target, summary: str = "", **known: Any) -> None:
    """Register a federated method, so that run files, `--methods`, tuning and reports know its name.

    Args:
        name: Name of the method in run files.
        target: A subclass of `fedms.Method`, or where to import it from: "module:Class", imported when a run starts.
        summary: One line that describes the method.
        known: Further fields of `MethodRow`, such as `settings`, a subclass of `fedms.Table` with the method's own keys, and
            `tuned`, a list of `fedms.Constant`.

    Raises:
        ConfigError: If another method or a table of the run file has this name.
    """
    from fedms.config.run_config import RunConfig

    row = MethodRow(name, target, summary, **{"table": name, **known})
    if row.settings is not None and row.table in RunConfig.model_fields:
        raise ConfigError(f"register method: {name} has a table [{row.table}], which every run file has; choose another name")
    METHODS.add(row)


def register_data(name: str, target: Target, summary: str = "", **known: Any) -> None:
    """Register a data set, so that run files can name it in `data.name`.

    Args:
        name: Name of the data set in run files.
        target: A function, or "module:function". It is called with the [data] table of the run file, the loaded model and a
            seed, and returns a `fedms.data.Dataset`.
        summary: One line that describes the data set.
        known: Further fields of `DataRow`; `holds` is "text", "images" or "conversations".

    Raises:
        ConfigError: If another data set has this name.
    """
    DATA.add(DataRow(name, target, summary, **known))


def register_model(name: str, target: Target, summary: str = "", **known: Any) -> None:
    """Register a foundation model, so that run files can name it in `model.id`.

    Args:
        name: Name of the model in run files.
        target: A function, or "module:function". It is called with the [model] table of the run file and returns a
            `fedms.models.FoundationModel`, such as a `fedms.ModuleModel`.
        summary: One line that describes the model.
        known: Further fields of `ModelRow`; `reads` is "text", "images" or "conversations".

    Raises:
        ConfigError: If another model has this name.
    """
    MODELS.add(ModelRow(name, target, summary, **known))


def load_object(target: Target) -> Any:
    """Import the object that "module:name" names, or return `target` if it is not a string.

    Raises:
        ConfigError: If it cannot be imported.
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
    """Import the modules in which other packages register their rows, once in each process.

    Raises:
        ConfigError: If a plugin cannot be imported; the message names it and the reason.
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
        hint = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) and error.name == module else ""
        raise ConfigError(f"plugin {module}, named by the {named_by}, cannot be imported: {type(error).__name__}: "
                          f"{error}{hint}") from error


def _origin(row: Row) -> str:
    """Return where a row's target is defined. The main module of a script has another name in processes that it starts."""
    target = row.target
    return target if isinstance(target, str) else f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', target)}"
