"""What all tables of a run file have in common, and the types of their keys that pydantic has none for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types
from pydantic import (AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema,
                      field_validator, model_validator)
from pydantic_core import CoreSchema, core_schema


def parse_size(value: Any) -> int:
    """Return the bytes of a human-readable size: ``1536``, ``"512MiB"``, ``"2 GiB"``, ``"1.5GB"`` (K = 1000, Ki = 1024)."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError('a size such as "2GiB", "500MB" or a number of bytes')
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?\s*", value, re.IGNORECASE)
        if match is None or (match[3] and not match[2]):
            raise ValueError('a size such as "2GiB", "500MB" or a number of bytes')
        power = " kmgt".index(match[2].lower() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not 0 <= size < 2**63:
        raise ValueError("a size of at least 0 bytes, below 2**63")
    return size


_SIZE = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]})
Size = Annotated[int, BeforeValidator(parse_size), _SIZE]
Rate = Annotated[int, BeforeValidator(parse_size), annotated_types.Ge(1), _SIZE]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]       # of a file or folder of this machine; ~ is the home folder


@dataclass(frozen=True)
class OneOf:
    """Accepts one of the names that a function returns, asked each time: names may be registered at any time."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names())}

    def _check(self, value: str) -> str:
        if value not in self.names():
            raise ValueError("not one of the accepted names")
        return value


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def fits_64_bits(value: Any) -> bool:
    """Return whether a value is anything but an integer of more than 64 bits, which TOML does not have."""
    return not isinstance(value, int) or -2**63 <= value < 2**63


class Table(BaseModel):
    """Base of every table: unknown keys are errors, types are not coerced (``"8"`` is no integer), values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _toml_arrays(cls, values: Any) -> Any:
        # TOML arrays arrive as lists; the fields are tuples, because a frozen table should be hashable throughout.
        return {k: _lists_to_tuples(v) for k, v in values.items()} if isinstance(values, Mapping) else values

    @field_validator("*", mode="after")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        if not fits_64_bits(value):
            raise ValueError("an integer of 64 bits, as those of TOML are")
        return value
