"""`RunConfig`: all tables of a run file in one value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import create_model, model_validator

from fedms.config import registry
from fedms.config.registry import MethodRow
from fedms.config.table import Table
from fedms.config.tables import (AggregateTable, ClientsTable, DataTable, GateTable, HeadTable, LoraTable, ModelTable, PrivacyTable,
                                 RunTable, SalTable, Stage1Table, Stage2Table, TaskTable, WireTable)


class RunConfig(Table):
    """A complete, validated run file. Attribute names are the TOML names.

    Instances are of the subclass `config_class()`, which adds a table for each method that has one.
    """

    task: TaskTable = TaskTable()
    model: ModelTable = ModelTable()
    head: HeadTable = HeadTable()
    data: DataTable = DataTable()
    lora: LoraTable = LoraTable()
    sal: SalTable = SalTable()
    stage1: Stage1Table = Stage1Table()
    stage2: Stage2Table = Stage2Table()
    gate: GateTable = GateTable()
    clients: ClientsTable = ClientsTable()
    aggregate: AggregateTable = AggregateTable()
    wire: WireTable = WireTable()
    privacy: PrivacyTable = PrivacyTable()
    run: RunTable = RunTable()

    @property
    def method_row(self) -> MethodRow:
        """What the catalogue says of the run's method."""
        return registry.methods()[self.run.method]

    @property
    def settings(self) -> Any:
        """The table of the run's own method; None for a method without one."""
        return getattr(self, self.method_row.table, None) if self.method_row.settings is not None else None

    @property
    def aggregation(self) -> str:
        """The aggregation rule in force: the one that is set, else the method's own, else the mean."""
        return self.aggregate.rule or self.method_row.aggregation or "mean"

    @property
    def expert_weight(self) -> float | None:
        """The fixed weight in [0, 1] of the local expert in the mixture; None if a gate learns it, or if there is no mixture."""
        weight = self.method_row.weight
        return None if weight is None else weight(self)

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        from fedms.config.checks import problems_of

        if problems := list(problems_of(self)):
            raise ValueError("\n".join(problems))
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The subclass is made anew in each process: its name cannot be imported.
        return _restore, (self.model_dump(),)


def config_class() -> type[RunConfig]:
    """Return `RunConfig` with the tables of all methods that are registered now."""
    return _class_with(tuple(registry.settings_tables().items()))


@lru_cache
def _class_with(tables: tuple[tuple[str, type[Table]], ...]) -> type[RunConfig]:
    fields: dict[str, Any] = {name: (settings, settings()) for name, settings in tables}
    return create_model("RunConfig", __base__=RunConfig, **fields)


def _restore(values: Mapping[str, Any]) -> RunConfig:
    return config_class().model_validate(values)
