"""Where a server stands, as lines for a terminal and as a live page for a browser on the same machine.

The page is read-only, listens on 127.0.0.1 alone, and answers only requests with the token of its address: other users of
the machine cannot read it. It asks for nothing but its own data; scripts and styles are in it.
"""
from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fedms.deployment.server import RUN, STATUS, members, read_config
from fedms.foreign import all_printable, parse_json, read_regular
from fedms.progress import validation_perplexity, validation_words
from fedms.storage.durable import owner
from fedms.storage.records import SUMMARY, RunFolderError, RunRecords

LAST_ROUNDS = 200       # rounds that the page draws


def state(folder: Path) -> dict[str, Any]:
    """Return the state of a server as plain data: its run, clients, rounds and notes, and whether it runs.

    Raises:
        DeploymentError: If the folder does not belong to a server.
    """
    config = read_config(folder)
    try:
        told = parse_json(read_regular(folder / STATUS))
    except (OSError, ValueError):
        told = {}
    running, rounds = owner(folder) is not None, config.stage1.rounds + config.stage2.rounds
    seen = {each["number"]: each for each in told.get("clients", ())}
    clients = [{"number": member.number, "name": member.name, "removed": member.removed,
                "connected": running and bool(seen.get(member.number, {}).get("connected")),
                "last": seen.get(member.number, {}).get("last")} for member in members(folder)]
    return all_printable({
        "running": running, "ended": (folder / RUN / SUMMARY).is_file(), "address": told.get("address"),
        "phase": told.get("phase"), "at": told.get("at"),
        "task": config.task.kind, "method": config.run.method, "model": config.model.id, "rounds_wanted": rounds,
        "seats": config.clients.count, "clients": clients, "rounds": _rounds(folder / RUN), "notes": told.get("notes", [])})


def _rounds(folder: Path) -> list[dict[str, Any]]:
    try:
        rounds = RunRecords.read(folder, whole=False).rounds[-LAST_ROUNDS:]
    except RunFolderError:
        return []
    shown = ("stage", "round", "clients", "loss", "validation_accuracy", "validation_loss", "bytes_up", "bytes_down", "seconds")
    return [{"perplexity": validation_perplexity(each), **{key: each.get(key) for key in shown}} for each in rounds]


def lines(told: dict[str, Any]) -> list[str]:
    """Return the lines that show a server's state, as `state` returns it, in a terminal."""
    rounds, last_round = told["rounds"], ""
    if rounds:
        last = rounds[-1]
        last_round = f"; last: {last['clients']} clients, validation {validation_words(told['task'], last)}, {last['seconds']:.1f} s"
    where = (f"listening on {told['address']}" if told["running"] else "the run has ended" if told["ended"] else
             "not running (fedms server start)")
    found = [f"server    {where}",
             f"run       {told['method']} on {told['model']}: {len(rounds)} of {told['rounds_wanted']} rounds{last_round}",
             f"traffic   {sum(r['bytes_up'] or 0 for r in rounds) / 1e6:.2f} MB received, "
             f"{sum(r['bytes_down'] or 0 for r in rounds) / 1e6:.2f} MB sent"]
    for client in told["clients"]:
        visit = client["last"]
        found.append(f"client    {client['number']:>3}  {client['name']:<20} " + (
            "removed" if client["removed"] else "connected" if client["connected"] else "away") + (
            "" if visit is None else f"; {visit['stage']}, round {visit['round']}: {visit['status']}"
            + (f" ({visit['reason']})" if visit["reason"] else "")))
    return found + [f"note      {note}" for note in told["notes"][-5:]]


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve the page in a thread, and yield its address, which has a new token each time."""
    state(folder)       # a folder that is none is said at once
    token = secrets.token_urlsafe(24)
    html = resources.files("fedms.deployment").joinpath("page.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "fedms", ""

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            given = parse_qs(asked.query).get("token", [""])[0]
            # The name by which it was called: another site's page cannot reach this one by a name of its own.
            if not hmac.compare_digest(given.encode(), token.encode()) or self.headers.get("Host") not in hosts:
                self._send(403, b"the address with its token is what `fedms server status --web` printed", "text/plain")
            elif asked.path == "/":
                self._send(200, html, "text/html; charset=utf-8")
            elif asked.path == "/state.json":
                self._send(200, json.dumps(state(folder)).encode(), "application/json")
            else:
                self._send(404, b"there is nothing of this name", "text/plain")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in (
                    ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                    ("Referrer-Policy", "no-referrer"), ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"),
                    ("Content-Security-Policy", "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
                                                "script-src 'unsafe-inline'")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Log nothing, since the address contains the token."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    hosts = {f"127.0.0.1:{server.server_port}", f"localhost:{server.server_port}"}
    threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/?token={token}"
    finally:
        server.shutdown()
        server.server_close()


def wait() -> None:
    """Wait for Ctrl-C."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
