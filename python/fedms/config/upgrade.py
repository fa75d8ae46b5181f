"""What earlier versions wrote, with the keys of today."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedms.config.problems import show
from fedms.errors import ConfigError

FORMAT = 2


def _name_the_samples_of_the_gate(tables: dict[str, Any]) -> None:
    """Format 2 says what the gate of fedms_plus is trained on. Folders of format 1 name no format; in the first ones
    fedms_plus had no table, and the mean and the models' own temperature were set where they now are unset."""
    gate, plus, model, aggregate, run = (t if isinstance(t := tables.get(name), dict) else {}
                                         for name in ("gate", "plus", "model", "aggregate", "run"))
    if "held_out" in gate:
        plus = {"held_out": gate.pop("held_out"), "prior": "off", "prior_in_stage1": False, "confidences": False}
        if aggregate.get("rule") == "mean":
            del aggregate["rule"]
        if model.get("temperature") == 0.05:
            del model["temperature"]
    if "held_out" in plus and "gate_on" not in plus:
        share = plus.pop("held_out")
        plus |= {"gate_on": "held_out", "held_out": share} if share else {"gate_on": "training"}
    if run.get("method") == "fedms_plus":
        tables["plus"] = plus
    else:
        tables.pop("plus", None)        # nothing that another method reads


# From each older format a function that turns its tables into the next one's, in place. A new key needs none where its
# default is what was done before.
_UPGRADES: dict[int, Callable[[dict[str, Any]], None]] = {1: _name_the_samples_of_the_gate}


def upgraded(values: Mapping[str, Any], assumed: int = 1) -> dict[str, Any]:
    """Return tables as a run file or :func:`dump` has them, with today's keys and without their ``format``.

    Args:
        assumed: The format of values that name none: 1 for what was recorded, :data:`FORMAT` for what people write.

    Raises:
        ConfigError: If the format is not known.
    """
    tables = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    version = tables.pop("format", assumed)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ConfigError(f"format: got {show(version)}; accepted: 1 to {FORMAT}. A newer version of fedms may have "
                          "written it: update fedms")
    for older in range(version, FORMAT):
        _UPGRADES[older](tables)
    return tables
