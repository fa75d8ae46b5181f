"""Where fetched data sets are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$FEDMS_CACHE, or ~/.cache/fedms. Not created here."""
    return Path(os.environ.get("FEDMS_CACHE") or Path.home() / ".cache" / "fedms")
