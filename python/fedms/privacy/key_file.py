"""The run's secret key, and the keys and random streams that are derived from it.

Privacy noise must not come from `run.seed`: every client is sent the seed, and whoever knows the noise can subtract it.
It comes from 32 secret bytes in a file of their own. Each use derives a key by HMAC-SHA256 (RFC 2104) over a name, so no
two uses share random numbers, and the same use draws the same numbers after a crash.
"""
from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedms.errors import USAGE, FedMSError

KEY_BYTES = 32


class KeyFileError(FedMSError):
    """The secret key cannot be read, or is not secret; the message says what to do."""

    exit_code = USAGE
    title = "secret key"


def read_key(path: Path) -> bytes:
    """Return the 32 bytes of a key file.

    Raises:
        KeyFileError: If the file is missing, has another length, or can be read by other users.
    """
    remedy = f"create one by `(umask 077; head -c {KEY_BYTES} /dev/urandom > {path})`"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyFileError(f"privacy.key: {path} does not exist; {remedy}") from None
    except OSError as error:
        raise KeyFileError(f"privacy.key: {path} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"privacy.key: {path} is not a regular file; name another path")
        if status.st_mode & 0o077:
            raise KeyFileError(f"privacy.key: {path} has mode {stat.S_IMODE(status.st_mode):04o}, so other users can read or "
                               f"replace it; run `chmod 600 {path}`, or create a new key if others may have read this one")
        key = os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(key) != KEY_BYTES:
        raise KeyFileError(f"privacy.key: {path} holds {len(key) if len(key) <= KEY_BYTES else 'more than 32'} bytes, expected "
                           f"{KEY_BYTES}; {remedy} at another path")
    return key


def create_key(path: Path, key: bytes | None = None) -> None:
    """Write a new key, from the operating system's generator unless `key` is given, with mode 0600.

    Raises:
        KeyFileError: If the path exists already (a key is never replaced) or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(f"privacy.key: {path} exists already and is not replaced; choose another path, or delete it if "
                           "no run needs it any more") from None
    except OSError as error:
        raise KeyFileError(f"privacy.key: {path} cannot be written: {error.strerror}") from None
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES) if key is None else key)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise KeyFileError(f"privacy.key: {path} cannot be written: {error.strerror}") from None


def derive(key: bytes, *names: str | int) -> bytes:
    """Return the 32-byte key for the use called `names`: HMAC-SHA256 of the names under `key`."""
    return hmac.digest(key, repr(names).encode(), "sha256")


class Stream:
    """An endless stream of random numbers: the ChaCha20 key stream (RFC 8439) of a 32-byte key.

    The nonce and the initial counter are zero, so a key must be used for one stream alone; `derive` makes such keys. The
    stream ends after 256 GiB.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()

    def bytes(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        return self._cipher.update(bytes(count))

    def words(self, count: int, dtype: str = "<u8") -> np.ndarray:
        """Return the next `count` unsigned little-endian integers, 64 bits each unless `dtype` says otherwise."""
        return np.frombuffer(self.bytes(count * np.dtype(dtype).itemsize), dtype)
