"""The documentation of run files and methods, written from the tables and the catalogue."""

from __future__ import annotations

from typing import Any

from fedms.config import registry
from fedms.config.explain import accepted, keys
from fedms.config.problems import show
from fedms.config.run_config import config_class


def reference() -> str:
    """Return docs/reference/configuration.md: for each table its keys with default, accepted values and meaning."""
    described = {name: (field.annotation.__doc__ or "") for name, field in config_class().model_fields.items()}
    lines = ["# The run file", "", "Every key of a run file, by table. `--set table.key=value` overrides one; "
             "`fedms run NAME --dry-run` prints all as they are then.", "",
             "`python -m fedms.config > fedms.schema.json` writes the JSON schema of a run file. An editor that checks TOML by a schema "
             "completes the keys with it, and marks mistakes as you type.", ""]
    for table, fields in keys().items():
        lines += [f"## `[{table}]`", "", *_first_paragraph(described.get(table, "")),
                  "| key | default | accepted | meaning |", "| --- | --- | --- | --- |"]
        for key, field in fields.items():
            default = "unset" if field.default is None else show(field.default)
            lines.append(f"| `{table}.{key}` | `{default}` | {accepted(field)} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def _first_paragraph(docstring: str) -> list[str]:
    """Return the first paragraph of a docstring and an empty line, or nothing."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    return [paragraph, ""] if paragraph else []


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, by which an editor completes and checks it as it is written."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **config_class().model_json_schema()}


def methods_table() -> str:
    """A table in Markdown: each method with what it trains, sends and its hyperparameters."""
    lines = ["| method | trained | sent | own hyperparameters |", "| --- | --- | --- | --- |"]
    for row in registry.methods().values():
        own = ", ".join(f"`{row.table}.{key}`" for key in row.settings.model_fields) if row.settings else ""
        lines.append(f"| `{row.name}` | {row.trained} | {row.sent} | {own} |")
    return "\n".join(lines) + "\n"
