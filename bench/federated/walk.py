"""The walk of docs/guide/deploy.md, from two empty folders to the first federated result, timed:
`python -m bench.federated.walk`, from the root of the project.

The commands are the page's own, typed word for word: the server's in one folder, one client's in another. The client has 120
sentences, the run 2 + 1 rounds on MiniLM. With --server-root and --client-root each machine is a root folder of its own (such as
debootstrap makes, with what a Dockerfile of docker/ installs), entered by chroot as the user 1000. For each command: seconds on the
clock, and of the processor.
"""
from __future__ import annotations

import argparse
import csv
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PAGE = Path("docs/guide/deploy.md")
MARK = "<!-- run by tests/system/test_deploy_page.py -->"
RUN_FILE = "\n[stage1]\nrounds = 2\n\n[stage2]\nrounds = 1\n"
WORDS = {"good": ("warm", "friendly", "careful", "quick", "clear", "gentle"),
         "bad": ("cold", "rude", "late", "dirty", "confusing", "rough")}
THINGS = ("nurse", "doctor", "room", "letter", "food", "phone call", "visit", "form")


@dataclass
class Machine:
    """A folder in which commands are typed; root: a root folder of its own, in which the folder lies; None: this machine's."""

    folder: Path
    root: Path | None

    @property
    def place(self) -> Path:
        return self.folder if self.root is None else self.root / self.folder.relative_to("/")

    def begin(self, words: str, log: Path) -> subprocess.Popen[bytes]:
        """Type a command into a shell; what it prints goes to `log`."""
        shell = ["bash", "-ec", f"cd {self.folder}; {words}"]
        if self.root is not None:
            shell = ["chroot", "--userspec=1000:1000", str(self.root), "env", f"HOME={self.folder}", *shell]
        with open(log, "ab") as file:
            return subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
                                    start_new_session=True)


def type_in(machine: Machine, words: str, log: Path) -> str:
    """Type a command, say yes to what it asks, print its seconds, and return what it printed."""
    started = time.monotonic()
    process = machine.begin(words, log)
    process.stdin.write(b"y\n")
    process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words}\n{log.read_text()}")
    shown = words.partition(" '")[0].replace("\n", "; ")     # without the line of the client's key
    print(f"| `{shown}` | {time.monotonic() - started:.0f} | {used.ru_utime + used.ru_stime:.0f} |", flush=True)
    return log.read_text()


def sentences(path: Path, count: int, labeled: bool) -> None:
    draw = random.Random(count)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sentence", "verdict"][:1 + labeled])
        for number in range(count):
            verdict = ("bad", "good")[number % 2]
            said = [f"the {draw.choice(THINGS)} was {draw.choice(WORDS[verdict])}" for _ in range(2)]
            table.writerow([f"Case {number}: {' and '.join(said)}.", verdict][:1 + labeled])


def walk(server: Machine, client: Machine, logs: Path) -> None:
    section = PAGE.read_text().split("## From two empty machines")[1].split("\n## ")[0]
    run_file = re.search(r"^```toml\n(.*?)^```", section, re.M | re.S)[1]
    init, join, begin, accept, serve, predict = (
        block.strip() for block in re.findall(rf"^{MARK}\n\n```sh\n(.*?)^```", section, re.M | re.S))
    (server.place / "my-run.toml").write_text(run_file + RUN_FILE)
    sentences(client.place / "cases.csv", 120, True)
    sentences(client.place / "new-cases.csv", 12, False)
    type_in(server, init.replace("fl.example.org", "127.0.0.1"), logs / "init")
    (client.place / "invite.toml").write_bytes((server.place / "federation/invite.toml").read_bytes())
    told = type_in(client, join, logs / "join")
    (line,) = [line for line in told.splitlines() if line.startswith("ecdsa-")]
    started, node = time.monotonic(), client.begin(begin, logs / "client")
    try:
        type_in(server, accept.replace("ecdsa-sha2-nistp384 AAAA... clinic-7", line), logs / "accept")
        print(type_in(server, serve, logs / "server")[-600:], file=sys.stderr)
    finally:
        os.killpg(node.pid, signal.SIGINT)
        _, _, used = os.wait4(node.pid, 0)
        print(f"| `{begin}`, until the run has ended | {time.monotonic() - started:.0f} | {used.ru_utime + used.ru_stime:.0f} |")
    print(type_in(client, predict, logs / "predict")[-400:], file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("server", "client"):
        parser.add_argument(f"--{side}-root", type=Path, metavar="DIR", help=f"root folder of the {side}'s machine (this machine's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        machines = []
        for side in ("server", "client"):
            root = getattr(arguments, f"{side}_root")
            machines.append(Machine(Path(place) / side if root is None else Path("/state/walk"), root))
            machines[-1].place.mkdir(parents=True)
            if root is not None:
                os.chown(machines[-1].place, 1000, 1000)
        print("| command | seconds | of the processor |\n| --- | --- | --- |")
        walk(*machines, Path(place))
    return 0


if __name__ == "__main__":
    sys.exit(main())
