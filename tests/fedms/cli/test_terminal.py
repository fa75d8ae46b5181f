"""The command line on terminals of all kinds, and the files that commands leave behind."""
from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from fedms.cli.stopping import STOPPING, polite_stop
from fedms.config import load_config
from fedms.errors import FOLDER, INTERRUPTED
from fedms.exports.manifest import save_tensors
from fedms.foreign import few
from fedms.methods import create
from fedms.runs.summary import MOST_REASONS, failures, never_trained
from fedms.storage.checkpoint import CheckpointFolder, Snapshot
from fedms.storage.durable import LOCK, FolderLock, open_new, owner, private_folder, write_durably
from synthetic import write_run


def fedms(*words, **environment):
    return subprocess.run([sys.executable, "-m", "fedms", *map(str, words)], capture_output=True,
                          encoding=environment.get("PYTHONIOENCODING", "utf-8"), env={**os.environ, **environment},
                          timeout=120)


def test_examples_are_one_a_line():
    lines = [line.strip() for line in fedms("run", "--help", COLUMNS="120").stdout.splitlines()]
    assert "fedms run sentiment" in lines and "fedms run sentiment --method fedavg --seed 1" in lines


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_results_are_shown_on_any_terminal(tmp_path, encoding):
    for method in ("fedavg", "fedms"):
        for seed in (0, 1):
            write_run(tmp_path / f"{method}-seed{seed}", method, seed)
    done = fedms("report", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert ("+/-" if encoding == "ascii" else "±") in done.stdout


def test_a_name_that_is_no_unicode_can_be_shown(tmp_path):
    folder = os.fsencode(tmp_path) + b"/run-\xff"
    done = subprocess.run([sys.executable, "-m", "fedms", "report", folder], capture_output=True, timeout=120)
    assert done.returncode == FOLDER and b"Traceback" not in done.stderr


def test_a_closed_terminal_stops_a_run_as_kill_does():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)        # the tests themselves may run under nohup
    with polite_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop()


def test_a_third_ctrl_c_and_one_while_the_process_ends_print_no_traceback():
    for again in ("inside", "after"):
        code = f"""
import os, signal, sys
from fedms.cli.stopping import polite_stop

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

try:
    with polite_stop() as stop:
        ctrl_c()
        assert stop()
        try:
            ctrl_c()
        finally:
            if {again == "inside"}:
                ctrl_c()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    ctrl_c()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (INTERRUPTED, "" if again == "inside" else "interrupted\n"), done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of signals as they were: a stop that was asked for leaves its own in place."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with polite_stop():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Files

@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_holds_for_what_is_shared(tmp_path, umask):
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a")
    write_durably(tmp_path / "b", b"x")
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o666 & ~umask


def test_what_is_private_is_closed_to_others(tmp_path, umask):
    (tmp_path / "k").mkdir(mode=0o777)
    CheckpointFolder(tmp_path / "k").save(Snapshot({}, {"t": torch.ones(2)}, {0: {"p": torch.ones(1)}}))
    assert mode(tmp_path / "k") == 0o700 and {mode(path) for path in (tmp_path / "k").iterdir()} == {0o600}


def test_links_are_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "link")
    write_durably(tmp_path / "link", b"new", private=True)
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "link").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "door").symlink_to(tmp_path / "folder")
    with pytest.raises(OSError):
        private_folder(tmp_path / "door")
    (tmp_path / "folder" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        FolderLock(tmp_path / "folder")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "-1", "0", "9" * 30, "x", "\udcff"])
def test_a_lock_that_names_no_process_has_no_owner(tmp_path, text):
    (tmp_path / LOCK).write_text(text, errors="surrogateescape")
    assert owner(tmp_path) is None


# Words

def test_of_many_names_a_few():
    assert few(["a", "b"]) == "a, b" and few(range(6)) == "0, 1, 2, 3, 4, 5"
    assert few(range(5000)) == "0, 1, 2, 3, 4 and 4,995 more" and "\x1b" not in few(["\x1b[31m"])


def test_failures_are_told_by_reason():
    visits = [{"status": "failed", "client": i, "stage": "stage1", "round": 1, "reason": "out of memory"} for i in range(900)]
    assert failures(visits) == ["900 visits failed, of clients 0, 1, 2, 3, 4 and 895 more; first in stage1, round 1: "
                                 "out of memory"]
    visits = [{**visit, "reason": str(i)} for i, visit in enumerate(visits)]
    assert len(failures(visits)) == MOST_REASONS + 1


@pytest.mark.parametrize("method, told", [("fedms", True), ("local", True), ("fedavg_ft", True), ("fedavg", False)])
def test_clients_that_were_never_chosen_are_told(method, told):
    config = load_config("digits", [f"run.method={method}", "clients.count=4"])
    visits = [{"stage": stage, "client": i, "status": "ok"} for i in (0, 1) for stage in ("stage1", "stage2")]
    said = never_trained(config, create(config).personal, visits, range(4))
    assert bool(said) == told and (not told or said[0].startswith("2 of 4 clients were never trained in stage"))
    assert not never_trained(config, create(config).personal, visits, range(2))
    assert not never_trained(config, create(config).personal, [{**v, "client": i} for v in visits for i in range(4)], range(4))
