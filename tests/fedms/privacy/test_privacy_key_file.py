"""The secret key: 32 bytes that nobody else can read."""
import os

import numpy as np
import pytest

from fedms.privacy.key_file import KeyFileError, Stream, create_key, derive, read_key


def test_new_key(tmp_path):
    create_key(tmp_path / "a"), create_key(tmp_path / "b")
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o600
    assert len(read_key(tmp_path / "a")) == 32 and read_key(tmp_path / "a") != read_key(tmp_path / "b")
    with pytest.raises(KeyFileError, match="exists already and is not replaced"):
        create_key(tmp_path / "a")
    with pytest.raises(KeyFileError, match="cannot be written"):
        create_key(tmp_path / "gone" / "a")


def test_missing(tmp_path):
    with pytest.raises(KeyFileError, match="privacy.key: .*does not exist; create one by .*head -c 32 /dev/urandom"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_readable_by_others(tmp_path, mode):
    create_key(tmp_path / "key")
    os.chmod(tmp_path / "key", mode)
    with pytest.raises(KeyFileError, match=f"mode {mode:04o}, so other users.*chmod 600"):
        read_key(tmp_path / "key")


@pytest.mark.parametrize("size, words", [(0, "0 bytes"), (31, "31 bytes"), (33, "more than 32 bytes")])
def test_another_length(tmp_path, size, words):
    (tmp_path / "key").write_bytes(bytes(size))
    os.chmod(tmp_path / "key", 0o600)
    with pytest.raises(KeyFileError, match=words):
        read_key(tmp_path / "key")


def test_no_regular_file(tmp_path):
    with pytest.raises(KeyFileError, match="is not a regular file"):
        read_key(tmp_path)


def test_derived_keys_differ_by_every_name():
    keys = {derive(key, *names) for key in (bytes(32), b"1" * 32) for names in ((), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1),
                                                                               ("a", "1"), (1,), (11,), (1, 1))}
    assert len(keys) == 20 and all(len(key) == 32 for key in keys)


def test_stream_is_chacha20():
    """RFC 8439, appendix A.1, test vectors 1 and 2: key and nonce zero, counters 0 and 1."""
    stream = Stream(bytes(32))
    assert stream.bytes(64).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert stream.bytes(64).hex().startswith("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed")
    assert (Stream(bytes(32)).words(4) == np.frombuffer(Stream(bytes(32)).bytes(32), "<u8")).all()
