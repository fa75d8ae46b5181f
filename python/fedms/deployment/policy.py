"""What a client's owner allows: a file that the client's node checks before it obeys a message.

`fedms client join` writes it with what the invitation asks for and generous limits; its owner may edit it at any time, the
next message meets the new one. Nothing in it can allow code of a server: that is never run.
"""
from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedms.config import RunConfig, parse_size
from fedms.deployment import DeploymentError
from fedms.errors import FedMSError
from fedms.foreign import conform, parse_json, parse_toml, read_regular
from fedms.storage.durable import write_durably

_HEAD = """\
# What this client takes part in. Checked before every message is obeyed; edit it at any time.
# A key that is removed limits nothing, but for models, methods and frozen, which must be there.
# hours: local time, may go past midnight ("22:00-06:00"). battery: least charge in percent while not plugged in.
# load: most load average a core, before a round begins. privacy.required: modes of privacy of which the run must have one,
# such as ["secure", "distributed"]. Code that a server sends is never run, whatever stands here.
"""

Share = Annotated[float, Field(ge=0, le=100)]


class PrivacyLimits(BaseModel):
    """The owner's limits on privacy.

    Attributes:
        required: Values of `privacy.mode` that are allowed, or None to allow any, "off" included.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    required: Annotated[list[Literal["central", "secure", "distributed"]], Field(min_length=1)] | None = None


class Policy(BaseModel):
    """The owner's limits, as `_HEAD` describes them. A limit that is None does not apply."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    models: list[str]
    methods: list[str]
    frozen: list[str]
    most_epochs: Annotated[int, Field(ge=1)] | None = None
    rounds_a_day: Annotated[int, Field(ge=0)] | None = None
    bytes_a_day: str | None = None
    hours: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$")] | None = None
    battery: Share | None = None
    load: Annotated[float, Field(gt=0)] | None = None
    disk: str | None = None
    privacy: PrivacyLimits = PrivacyLimits()


_POLICY = TypeAdapter(Policy)


class Refusal(FedMSError):
    """A message was refused because of the owner's policy or agreement. The error gives the reason."""

    title = "refused by this machine's policy"


def default_policy(config: RunConfig) -> Policy:
    """Return a policy that allows what the run file requires, with generous limits on the use of the machine."""
    required = None if config.privacy.mode == "off" else [config.privacy.mode]
    return Policy(models=[config.model.id], methods=[config.run.method], frozen=[config.model.frozen],
                  most_epochs=max(config.stage1.epochs, config.stage2.epochs), rounds_a_day=1000, bytes_a_day="10GiB",
                  hours="00:00-24:00", battery=30.0, disk="1GiB", privacy=PrivacyLimits(required=required))


def write_policy(path: Path, policy: Policy) -> None:
    """Write a client's limits as commented TOML that its owner alone can read."""
    write_durably(path, (_HEAD + "\n" + tomli_w.dumps(policy.model_dump(exclude_none=True))).encode(), private=True)


def read_policy(path: Path) -> Policy:
    """Read a policy, or raise DeploymentError if it is missing or not valid."""
    try:
        policy = conform(_POLICY, parse_toml(read_regular(path)))
        for size in (policy.bytes_a_day, policy.disk):
            if size is not None:
                parse_size(size)
        return policy
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{path}: no policy that can be read: {error}; repair it, nothing is done until then") from None


@dataclass
class Journal:
    """A file that counts today's rounds, and today's bytes sent and received."""

    path: Path
    day: str = ""
    rounds: int = 0
    bytes: int = 0

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Read a journal. One that cannot be read counts as empty, because only the owner's own limits depend on it."""
        try:
            told = parse_json(read_regular(path))
            return cls(path, str(told["day"]), int(told["rounds"]), int(told["bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path)

    def today(self, now: datetime.datetime) -> Journal:
        """Return the journal, reset to zeros if it is of an earlier day than `now`."""
        if self.day != now.date().isoformat():
            self.day, self.rounds, self.bytes = now.date().isoformat(), 0, 0
        return self

    def add(self, rounds: int, amount: int, now: datetime.datetime) -> None:
        """Add rounds and an amount of bytes to today's, and write the file."""
        self.today(now)
        self.rounds, self.bytes = self.rounds + rounds, self.bytes + amount
        write_durably(self.path, json.dumps({"day": self.day, "rounds": self.rounds, "bytes": self.bytes}).encode(), private=True)


def check(policy: Policy, config: RunConfig, journal: Journal, folder: Path, now: datetime.datetime,
          machine: Mapping[str, Any] | None = None) -> None:
    """Check that the policy allows a round of this run now.

    Args:
        policy: The owner's limits.
        config: The run file.
        journal: What was done today.
        folder: A folder on the disk that must have free space.
        now: The local time.
        machine: A mapping with the keys of `machine_state`, or None to look at this machine.

    Raises:
        Refusal: If the policy does not allow it. The message names the limit.
    """
    found = machine_state(folder) if machine is None else machine
    today = journal.today(now)
    epochs = max(config.stage1.epochs, config.stage2.epochs)
    for key, value, allowed in (("models", config.model.id, policy.models), ("methods", config.run.method, policy.methods),
                                ("frozen", config.model.frozen, policy.frozen)):
        if value not in allowed:
            raise Refusal(f"policy: {key} allows {', '.join(allowed) or 'none'}, not {value}")
    if policy.privacy.required is not None and config.privacy.mode not in policy.privacy.required:
        raise Refusal(f"policy: privacy.required allows {', '.join(policy.privacy.required)}, the run has privacy.mode = "
                      f"{config.privacy.mode}")
    if config.model.trust_remote_code:
        raise Refusal("policy: a model that brings code of its own is never loaded here (model.trust_remote_code)")
    if policy.most_epochs is not None and epochs > policy.most_epochs:
        raise Refusal(f"policy: most_epochs is {policy.most_epochs}, the run makes {epochs} a round")
    if policy.rounds_a_day is not None and today.rounds >= policy.rounds_a_day:
        raise Refusal(f"policy: rounds_a_day is {policy.rounds_a_day}, and {today.rounds} were done today")
    if policy.bytes_a_day is not None and today.bytes >= parse_size(policy.bytes_a_day):
        raise Refusal(f"policy: bytes_a_day is {policy.bytes_a_day}, and {today.bytes} were sent and received today")
    if policy.hours is not None and not _within(policy.hours, now):
        raise Refusal(f"policy: hours are {policy.hours}, it is {now:%H:%M} here")
    if policy.battery is not None and found["battery"] is not None and found["battery"] < policy.battery:
        raise Refusal(f"policy: battery is {policy.battery:g} % at least, it is at {found['battery']:.0f} %")
    if policy.load is not None and found["load"] > policy.load:
        raise Refusal(f"policy: load is {policy.load:g} a core at most, it is {found['load']:.1f}")
    if policy.disk is not None and found["disk"] < parse_size(policy.disk):
        raise Refusal(f"policy: disk asks for {policy.disk} free, there are {found['disk'] / 2**20:.0f} MiB")


def machine_state(folder: Path) -> dict[str, Any]:
    """Return the state of this machine.

    Returns:
        battery: Charge in percent, or None while plugged in or without a battery.
        load: Load average per core.
        disk: Free bytes on the disk of `folder`.
    """
    try:
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except OSError:         # in a container without /sys
        battery = None
    return {"battery": None if battery is None or battery.power_plugged else battery.percent,
            "load": psutil.getloadavg()[0] / (psutil.cpu_count() or 1), "disk": shutil.disk_usage(folder).free}


def _within(hours: str, now: datetime.datetime) -> bool:
    begin, end = (int(text[:2]) * 60 + int(text[3:]) for text in hours.split("-"))
    minute = now.hour * 60 + now.minute
    return begin <= minute < end if begin < end else minute >= begin or minute < end
