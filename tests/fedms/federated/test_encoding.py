"""Messages: exact or of known error, and nothing malformed gets through."""
from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedms.federated.encoding import WireError, pack, unpack


def tensors():
    return {"expert/layer.0.lora_a": torch.randn(8, 30) * 0.1, "expert/layer.0.lora_b": torch.randn(5, 8),
            "head/bias": torch.randn(3), "log_temperature": torch.tensor(-2.5), "empty": torch.empty(0, 4),
            "class_counts": torch.tensor([3.0, 1e17, 0.1], dtype=torch.float64), "steps": torch.tensor([7])}


def equal(a, b):
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape for n in a)


@pytest.mark.parametrize("encoding, error", [("fp32", 0), ("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_what_is_sent_arrives(encoding, error):
    sent = tensors()
    got = unpack(pack(sent, encoding))
    assert equal(sent, got)
    for name, tensor in sent.items():
        exact = tensor.dtype != torch.float32 or (encoding == "int8" and tensor.dim() < 2)
        scale = tensor.abs()
        if encoding == "int8" and tensor.numel() and not exact:
            scale = scale.amax(1 if len(tensor) <= tensor.shape[1] else 0, keepdim=True)
        assert bool(((got[name] - tensor).abs() <= (0 if exact else error) * scale * 1.001).all()), name


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8"])
def test_sending_on_changes_nothing_more(encoding):
    once = unpack(pack(tensors(), encoding))
    twice = unpack(pack(once, encoding))
    assert all(torch.allclose(once[n], twice[n], rtol=1e-6, atol=0) for n in once)


def test_sizes():
    pair = {"a": torch.zeros(8, 384), "b": torch.zeros(384, 8)}
    sizes = {encoding: len(pack(pair, encoding)) for encoding in ("fp32", "bf16", "int8")}
    head = len(pack({})) - 2
    assert sizes["fp32"] - 2 * sizes["bf16"] < 0 and head == 8
    assert sizes["fp32"] < 4 * 2 * 8 * 384 + 80 and sizes["bf16"] < 2 * 2 * 8 * 384 + 80
    assert sizes["int8"] < 2 * 8 * 384 + 4 * (8 + 8) + 80
    assert unpack(pack({})) == {}


def test_zeros_and_extremes_survive_int8():
    sent = {"x": torch.tensor([[0.0] * 4, [1e-40, -1e-40] * 2, [3e38, -3e38] * 2])}
    got = unpack(pack(sent, "int8"))["x"]
    assert torch.isfinite(got).all() and torch.equal(got[0], sent["x"][0]) and torch.allclose(got[2], sent["x"][2])
    assert unpack(pack({"x": torch.randn(3, 2, 5)}, "int8"))["x"].shape == (3, 2, 5)


def test_refused_to_send():
    with pytest.raises(ValueError, match="encoding must be one of fp32, bf16, int8, got 'zip'"):
        pack({}, "zip")
    with pytest.raises(ValueError, match="x: torch.float16 does not travel"):
        pack({"x": torch.zeros(1, dtype=torch.float16)})


def test_every_cut_and_any_addition_is_noticed():
    message = pack(tensors(), "int8")
    for length in range(len(message)):
        with pytest.raises(WireError):
            unpack(message[:length])
    with pytest.raises(WireError, match="the payload should be"):
        unpack(message + b"\0")


def manifest(entries):
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head


@pytest.mark.parametrize("entries", [
    {"a": 1}, [1], [["a", [1], "float32"]], [["a", [-1], "float32", "fp32"]], [["a", [1.5], "float32", "fp32"]],
    [["a", [True], "float32", "fp32"]], [["a", [2**60], "float32", "fp32"]], [["a", [2**47, 2**47], "float32", "fp32"]],
    [["a", [0], "float16", "fp32"]], [["a", [0], "float32", "exact"]], [["a", [0], "float64", "fp32"]],
    [["a", [0], "float32", "int8"]], [[1, [0], "float32", "fp32"]], [["a", "0", "float32", "fp32"]],
    [["a", [0], "float32", "fp32"], ["a", [0], "float32", "fp32"]], [["a", [0], "float32", ["fp32"]]], None])
def test_malformed_manifests_are_refused(entries):
    with pytest.raises(WireError):
        unpack(manifest(entries))


def test_a_huge_claim_allocates_nothing():
    with pytest.raises(WireError, match="the manifest should be"):
        unpack(struct.pack("<Q", 2**63) + b"[]")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(data):
    for message in (data, struct.pack("<Q", len(data)) + data):
        try:
            unpack(message)
        except WireError:
            pass


def test_random_flips_never_crash():
    message, draw = bytearray(pack(tensors(), "bf16")), random.Random(0)
    for _ in range(500):
        place, bit = draw.randrange(len(message)), 1 << draw.randrange(8)
        message[place] ^= bit
        try:
            unpack(bytes(message))
        except WireError:
            pass
        message[place] ^= bit
