"""A deployment's folder, and its processes on this machine.

    DIR/
      pyproject.toml  fedms_app/     the Flower app: a shim that names `fedms.runs.flower_app`
      run.toml                       the run file, everything filled in
      data/server  data/client-0 ... who has which samples
      certificates/                  see `fedms.engines.flower.certificates`
      flower/                        Flower's own: its configuration, the SuperLink's database, logs, processes.json
      states/client-0 ...            clients' private states, where clients run on this machine
      runs/                          run folders
"""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import psutil
import tomli_w
from pydantic import TypeAdapter

from fedms.engines.flower import certificates
from fedms.errors import FedMSError
from fedms.foreign import conform, parse_json, parse_toml, read_regular
from fedms.storage.durable import private_folder, write_durably

HOST, PORT = "127.0.0.1", 19091

_PYPROJECT = '''\
# A Flower app: `flwr run . fedms` starts the run, `flwr list`, `flwr log RUN` and `flwr stop RUN` look after it.
[project]
name = "fedms-app"
version = "1.0.0"
description = "A FedMS run on Flower"
license = {{ text = "unspecified" }}
dependencies = ["fedms[flower]"]

[tool.flwr.app]
publisher = "fedms"
# What goes to every node; without this, each text file below this folder.
fab-include = ["fedms_app/*.py"]

[tool.flwr.app.components]
serverapp = "fedms_app:server"
clientapp = "fedms_app:client"

# Paths are those of the SuperLink's machine. `set` is a JSON list of overrides of the run file.
[tool.flwr.app.config]
run-file = {run_file}
data = {data}
out = {out}
set = "[]"
force = false
resume = false
'''
_SHIM = '''\
"""What Flower ships to every node: the names of the two sides, which the installed package brings."""
from fedms.runs.flower_app import client, server

__all__ = ["client", "server"]
'''


class DeploymentError(FedMSError):
    """A deployment's folder or processes that are not what they should be."""


def write_app(folder: Path, run_file: str, host: str, port: int | None) -> None:
    """The Flower app, the run file, and certificates and a connection for a SuperLink on this host."""
    folder = folder.absolute()
    write_connection(folder, host, port or PORT, secure=True)
    certificates.make(folder / "certificates", [host], max(clients_of(folder)) + 1)
    (folder / "fedms_app").mkdir(parents=True, exist_ok=True)
    (folder / "fedms_app/__init__.py").write_text(_SHIM)
    (folder / "run.toml").write_text(run_file)
    paths = {"run_file": folder / "run.toml", "data": folder / "data/server", "out": folder / "runs/run"}
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(**{k: json.dumps(str(v)) for k, v in paths.items()}))


def write_connection(folder: Path, host: str, port: int, secure: bool) -> None:
    """Tells `flwr` where the SuperLink is."""
    home = private_folder(folder / "flower")
    authority = json.dumps(str(folder.absolute() / "certificates/ca.crt"))
    trust = f"root-certificates = {authority}" if secure else "insecure = true"
    write_durably(home / "config.toml", (f'[superlink]\ndefault = "fedms"\n\n[superlink.fedms]\n'
                                         f'address = "{host}:{port}"\n{trust}\n').encode())


def connection(folder: Path) -> tuple[str, int]:
    """Host and port of the deployment's SuperLink. Raises DeploymentError if its folder does not say."""
    path = folder / "flower/config.toml"
    try:
        host, port = parse_toml(read_regular(path))["superlink"]["fedms"]["address"].rsplit(":", 1)
        return host, int(port)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeploymentError(f"{path}: does not say where the SuperLink is: {error}; make the deployment again") from None


def environment(folder: Path) -> dict[str, str]:
    """For Flower's processes: its own folder, and this Python's commands first."""
    return {**os.environ, "FLWR_HOME": str(folder.absolute() / "flower"),
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}


@dataclass(frozen=True)
class Commands:
    """What starts a deployment's processes: for this machine, or to be typed on others."""

    folder: Path
    host: str
    port: int
    secure: bool = True

    def superlink(self, bind: str) -> list[str]:
        keys = self.folder / "certificates"
        security = (["--ssl-certfile", f"{keys}/server.pem", "--ssl-keyfile", f"{keys}/server.key",
                     "--ssl-ca-certfile", f"{keys}/ca.crt", "--enable-supernode-auth"] if self.secure else ["--insecure"])
        return ["flower-superlink", *security, "--host", bind, "--port", str(self.port), "--database",
                f"{self.folder}/flower/superlink.db", "--disable-runtime-dependency-installation"]

    def register(self, client: int) -> list[str]:
        return ["flwr", "supernode", "register", f"{self.folder}/certificates/client-{client}.pub", "fedms", "--name",
                f"client-{client}"]

    def supernode(self, client: int, port: int = 9094) -> list[str]:
        """`port`: for the node's own processes, on its machine alone."""
        keys = self.folder / "certificates"
        security = (["--root-certificates", f"{keys}/ca.crt", "--auth-supernode-private-key", f"{keys}/client-{client}"]
                    if self.secure else ["--insecure"])
        node = (f'client={client} data="{self.folder}/data/client-{client}" state="{self.folder}/states/client-{client}" '
                f'run="{self.folder}/run.toml"')
        return ["flower-supernode", *security, "--superlink", f"{self.host}:{self.port}", "--port", str(port),
                "--node-config", node]


def clients_of(folder: Path) -> list[int]:
    """Clients whose data the folder holds. Raises DeploymentError if there are none."""
    found = sorted(int(path.name.removeprefix("client-")) for path in (folder / "data").glob("client-*")
                   if re.fullmatch("client-[0-9]{1,9}", path.name))
    if not found:
        raise DeploymentError(f"{folder}: no deployment; make one by `fedms flower init {folder} RUNFILE`")
    return found


# Processes on this machine

def up(folder: Path, port: int | None, secure: bool, tell: Callable[[str], None]) -> Commands:
    """Starts a SuperLink and a SuperNode for each client on loopback; `port`: another one than at init.

    Raises:
        DeploymentError: if they run already, a port is taken, or one of them ends.
    """
    folder = folder.absolute()
    clients = clients_of(folder)
    if running(folder):
        raise DeploymentError(f"{folder}: is up already; `fedms flower down {folder}` ends it")
    host, agreed = connection(folder)
    if host != HOST:
        raise DeploymentError(f"{folder}: was made for {host}; its processes are started one by one, see docs/guide/deploy.md")
    port = port or agreed
    ports = range(port, port + 1 + len(clients))
    for number in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, number))
            except OSError as error:
                raise DeploymentError(f"port {number}: {error.strerror}; ports {ports[0]} to {ports[-1]} are needed, "
                                      "choose others by --port") from None
    if secure:
        _check_certificates(folder, tell)
    write_connection(folder, HOST, port, secure)
    commands = Commands(folder, HOST, port, secure)
    try:
        start(folder, "superlink", commands.superlink(HOST))
        wait(folder, "superlink", port)
        if secure:
            for client in clients:
                tell(f"registering client {client}")
                _register(folder, commands.register(client))
        for client, own in zip(clients, ports[1:]):
            start(folder, f"client-{client}", commands.supernode(client, own))
    except BaseException:
        down(folder)
        raise
    return commands


def _check_certificates(folder: Path, tell: Callable[[str], None]) -> None:
    """Raises DeploymentError if one has expired; tells of one that will soon."""
    keys = folder / "certificates"
    try:
        lines, first = certificates.warnings(keys), min(certificates.ends(keys).values())
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{keys}: {error}") from None
    if lines and first <= datetime.now(timezone.utc):
        raise DeploymentError("\n".join(lines))
    for line in lines:
        tell(line)


def start(folder: Path, name: str, command: Sequence[str]) -> None:
    """Starts one process of a deployment; its output goes to `flower/NAME.log`."""
    home = folder / "flower"
    private_folder(home)
    with open(home / f"{name}.log", "ab") as log:
        program = shutil.which(command[0], path=environment(folder)["PATH"]) or command[0]
        process = subprocess.Popen([program, *command[1:]], cwd=home, env=environment(folder), stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    _write_processes(folder, {**_processes(folder), name: [process.pid, _started(process.pid)]})


def running(folder: Path) -> dict[str, int]:
    """Process ids of what `up` started here and is still there, by name."""
    return {name: pid for name, (pid, started) in _processes(folder).items() if _same(pid, started)}


def down(folder: Path, names: Sequence[str] | None = None, by: int = signal.SIGTERM) -> list[str]:
    """Ends what `up` started, or some of it, each with its children; returns the names."""
    there = running(folder)
    chosen = [name for name in there if names is None or name in names]
    # Flower gives some children process groups of their own; who has a child is known while it lives alone.
    family = {child: _started(child) for name in chosen for child in _descendants(there[name])}
    for name in chosen:
        _signal(there[name], by)
    deadline = time.monotonic() + 20
    while left := [name for name in chosen if name in running(folder)]:
        if time.monotonic() > deadline:
            for name in left:
                _signal(there[name], signal.SIGKILL)
        time.sleep(0.1)
    for child, started in family.items():
        if _same(child, started):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    for name in chosen:
        _signal(there[name], signal.SIGKILL)        # its process group is its own
    _write_processes(folder, {name: entry for name, entry in _processes(folder).items() if name not in chosen})
    return chosen


def wait(folder: Path, name: str, port: int, seconds: float = 180) -> None:
    """Until a process of the deployment takes connections. Raises DeploymentError if it has ended, or does not come up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if name not in running(folder):
            break
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    log = (folder / f"flower/{name}.log").read_text(errors="replace").splitlines()
    raise DeploymentError("\n".join([f"the {name} did not come up; the end of flower/{name}.log:", *log[-8:]]))


def _register(folder: Path, command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    if done.returncode and "already" not in (done.stdout + done.stderr):
        raise DeploymentError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


_PROCESSES = TypeAdapter(dict[str, tuple[int, float | None]])


def _processes(folder: Path) -> dict[str, tuple[int, float | None]]:
    """Process id and start, seconds since 1970, of what `up` started, by name."""
    path = folder / "flower/processes.json"
    try:
        entries = {name: tuple(entry) if isinstance(entry, list) else entry
                   for name, entry in dict(parse_json(read_regular(path))).items()}
        return conform(_PROCESSES, entries)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise DeploymentError(f"{path}: does not name the processes of this deployment: {error}; end them by hand and "
                              "remove the file") from None


def _write_processes(folder: Path, entries: Mapping[str, Sequence[float | None]]) -> None:
    write_durably(folder / "flower/processes.json", json.dumps(entries, indent=1).encode(), private=True)


def _started(pid: int) -> float | None:
    """When a process began, seconds since 1970: a number that was given again has another start. None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError, OverflowError):
        return None


def _same(pid: int, started: float | None) -> bool:
    """Whether the process of this number is still the one that began then. A second: the system's clock may be set."""
    now = _started(pid)
    return now is not None and started is not None and abs(now - started) < 1


def lives(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits for its parent to notice."""
    return _started(pid) is not None


def _descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _signal(leader: int, number: int) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        pass


# A run on it

def submit(folder: Path, settings: Mapping[str, object]) -> int:
    """`flwr run`, to its end; the run's log goes to this terminal. Returns its exit code.

    settings: replace those of the app's configuration. They go by a file: on the command line Flower splits them at
    spaces and quotes, which overrides of a run file may hold."""
    file = folder.absolute() / "flower/settings.toml"
    write_durably(file, tomli_w.dumps(dict(settings)).encode(), private=True)
    return subprocess.run(["flwr", "run", str(folder.absolute()), "fedms", "--stream", "-c", str(file)], cwd=folder,
                          env=environment(folder)).returncode
