"""A federation on this machine: four clients with files of their own in four forms, and nodes in threads of this process."""
from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from PIL import Image
from safetensors.torch import load_file
from saved_models import save

from fedms.config import load_config
from fedms.deployment import join, node, server
from fedms.deployment.node import Node, Worker
from fedms.progress import Progress

NAMES = ("anna", "bert", "cleo", "dora")        # in the order of their numbers
CLASSES = ("dark", "light")


def images(seed, count=24):
    """(image, class) pairs, 16x16 in color, each dark or light."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        level = 60 if i % 2 == 0 else 190
        yield Image.fromarray(draw.integers(level - 50, level + 50, (16, 16, 3)).astype(np.uint8)), CLASSES[i % 2]


def png(image):
    import io

    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def write_data(folder: Path, name: str) -> Path:
    """What a client has: anna a CSV beside images, bert a Parquet file with them, cleo CLASS/IMAGE, dora lines of JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(images(NAMES.index(name)))
    if name == "bert":
        import pandas

        pandas.DataFrame({"image": [png(i) for i, _ in pairs], "label": [c for _, c in pairs]}).to_parquet(folder / "own.parquet")
        return folder / "own.parquet"
    if name == "cleo":
        for number, (image, label) in enumerate(pairs):
            (folder / "own" / label).mkdir(parents=True, exist_ok=True)
            image.save(folder / "own" / label / f"{number:03}.png")
        return folder / "own"
    for number, (image, _) in enumerate(pairs):
        image.save(folder / f"{number:03}.png")
    rows = [(f"{number:03}.png", label) for number, (_, label) in enumerate(pairs)]
    if name == "anna":
        (folder / "own.csv").write_text("image,label\n" + "".join(f"{file},{label}\n" for file, label in rows))
        return folder / "own.csv"
    (folder / "own.jsonl").write_text("".join(json.dumps({"image": file, "label": label}) + "\n" for file, label in rows))
    return folder / "own.jsonl"


def model(folder: Path) -> Path:
    return folder / "model" if (folder / "model").exists() else save("vit", folder / "model")


def run_file(folder: Path, *sets: str, count: int = 4):
    """The settings of a federation of tiny runs."""
    return load_config("digits", [
        "run.method=fedms", f"model.id={model(folder)}", "data.name=clients", f"data.classes={json.dumps(CLASSES)}", "data.partition=own",
        "data.global_test=0", "data.max_samples=none", f"clients.count={count}", "clients.unseen=0", "stage1.rounds=2",
        "stage2.rounds=1", "run.threads=1", "clients.round_timeout=120", *sets])


def markers_of(state: Path, data: Path) -> list[bytes]:
    """Bytes that are nowhere but at a client: of its private key (the number, and the text of its file), of a file with its
    data, of its samples as the model reads them, and of its private expert.

    Args:
        state: The client's folder.
        data: The folder that `write_data` filled.
    """
    key = load_ssh_private_key((state / "key").read_bytes(), None).private_numbers().private_value.to_bytes(48, "big")
    text = (state / "key").read_bytes().splitlines()[7]        # of which most is that number
    (file,) = (p for p in (data / "own.parquet", data / "000.png", data / "own/dark/000.png") if p.exists())
    pixels = load_file(state / "data.safetensors")["pixels"].contiguous().numpy().tobytes()
    kept = [load_file(path) for path in (state / "private").rglob("state/*.safetensors") if path.stat().st_size > 1000]
    # A pair of the last block, which is trained first. Whole: one step moves each number by the same amount, up or down.
    expert = kept[0][max(name for name in kept[0] if name.endswith("fc1.lora_b"))]
    return [key, text, file.read_bytes()[80:140], pixels[1000:1100], expert.numpy().tobytes()]


def federation(folder: Path, names=NAMES, *sets: str, host: str = "127.0.0.1", port: int = 0):
    """A server's folder and the folders of these clients, all accepted."""
    server.init(folder / "server", run_file(folder, *sets), host, port, Progress())
    for name in names:
        member = server.accept(folder / "server", joined(folder, name).line())
        assert member.name == name
    return folder / "server"


class InThisProcess(Worker):
    """Does the work at once, one client at a time: a process of its own would import torch first."""

    busy = threading.Lock()

    def do(self, *task):
        with self.busy:
            done = node._work(*task)
        if isinstance(done, str):
            raise node.Refusal(done)
        return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def joined(folder: Path, name: str):
    invitation = join.read_invitation(folder / "server/invite.toml")
    joining = join.prepare(invitation, str(write_data(folder / "data" / name, name)), name, Progress())
    return join.write(joining, folder / "clients" / name)


@contextmanager
def nodes(states, told):
    """Serves these clients, each on a thread; `told`: lines of each by name. Ends them in the end."""
    stop = threading.Event()
    threads = []
    for state in states:
        lines = told.setdefault(state.about.name, [])
        node = Node(state, lines.append)
        threads.append(threading.Thread(target=node.run, args=(stop.is_set,), daemon=True))
        threads[-1].start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
