"""A client as a service of its user: a systemd unit that is started again when it ends and when the machine starts."""
from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from fedms.deployment import DeploymentError
from fedms.deployment.state import ClientState
from fedms.storage.durable import write_durably

_UNIT = """\
[Unit]
Description=FedMS client {name}
After=network-online.target

[Service]
ExecStart="{python}" -m fedms client start "{folder}" --device {device}
Restart=always
RestartSec=10
UMask=0077
NoNewPrivileges=yes
Nice=10

[Install]
WantedBy=default.target
"""


def unit_path(state: ClientState) -> Path:
    """Return the path of the client's unit. Its name is derived from the client's folder."""
    tag = hashlib.sha256(str(state.folder.absolute()).encode()).hexdigest()[:8]
    return Path.home() / ".config/systemd/user" / f"fedms-client-{tag}.service"


def unit_text(state: ClientState, device: str = "auto") -> str:
    """Return the text of the client's unit.

    Args:
        state: The client's folder.
        device: The device that computes, a value of `run.device`.

    Raises:
        DeploymentError: If the path of the folder has characters that a unit cannot hold.
    """
    folder = str(state.folder.absolute())
    if any(c in folder for c in '"\\\n%$'):
        raise DeploymentError(f"{folder}: a service needs a path without quotation marks, backslashes, % and $")
    return _UNIT.format(name=state.about.name, python=sys.executable, folder=folder, device=device)


def install(state: ClientState, device: str = "auto") -> str:
    """Write the client's unit and start it, if systemd runs here. Return a text that says what was done."""
    path, text = unit_path(state), unit_text(state, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())
    for words in (["daemon-reload"], ["enable", "--now", path.name]):
        if (problem := _systemctl(*words)) is not None:
            return (f"wrote {path}, but systemctl --user {' '.join(words)} did not work ({problem}); start it by hand: systemctl "
                    f"--user enable --now {path.name}")
    return (f"wrote {path} and started it; see it by journalctl --user -u {path.name}. It starts with the machine once lingering "
            "is on: loginctl enable-linger")


def remove(state: ClientState) -> None:
    """Stop and remove the client's unit, if there is one."""
    path = unit_path(state)
    if path.exists():
        _systemctl("disable", "--now", path.name)
        path.unlink()


def _systemctl(*words: str) -> str | None:
    """Call `systemctl --user`. Return None if it succeeded, otherwise the reason why it did not."""
    if shutil.which("systemctl") is None:
        return "there is no systemctl here"
    done = subprocess.run(["systemctl", "--user", *words], capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip().split("\n")[0]
