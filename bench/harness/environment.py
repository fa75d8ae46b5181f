"""What a figure is worth nothing without: the command that gave it, the commit, and the machine."""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def machine() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    return {"command": " ".join(["python", *(os.path.relpath(word, ROOT) if os.path.isabs(word) else word
                                             for word in sys.argv)]),
            "commit": git("rev-parse", "--short", "HEAD").strip(),
            "changed files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
            "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "python": platform.python_version(), "torch": torch.__version__}


def save(path: Path, found: Any) -> None:
    """Writes figures as JSON, with the machine's description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "found": found}, indent=1) + "\n")
