"""Which device a run file means, and what is said where it cannot be had."""
from __future__ import annotations

import pytest
import torch

from fedms.config import load_config
from fedms.engines.flower.simulation import share_of_gpu
from fedms.errors import ConfigError
from fedms.training import device as devices
from fedms.training.device import choose, one_gpu_each, self_check

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    """Two CUDA GPUs, of which the first fails its self-check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(devices, "self_check", lambda device: "its kernels fail" if device.index == 0 else None)
    monkeypatch.setattr(devices, "_prepared", lambda device: device)


def test_the_cpu_passes_the_self_check_and_a_wrong_product_does_not(monkeypatch):
    assert self_check(CPU) is None
    right = devices.expert_linear
    monkeypatch.setattr(devices, "expert_linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert "compute output wrong" in self_check(CPU)


def test_the_self_check_looks_at_every_gradient(monkeypatch):
    right = devices.expert_linear

    def without_gradient_of_the_gate(*args, gate):
        return right(*args, gate=gate.detach()) + 0 * gate.sum()

    monkeypatch.setattr(devices, "expert_linear", without_gradient_of_the_gate)
    assert "compute dgate wrong" in self_check(CPU)


def test_a_kernel_that_raises_is_a_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(devices, "expert_linear", broken)
    assert self_check(CPU) == "its kernels fail (RuntimeError: no kernel image)"


def test_auto_is_the_cpu_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose("auto").device == CPU and choose("auto").notes == ()
    with pytest.raises(ConfigError, match='run.device: got "?\'?cuda:1.*torch sees no CUDA GPU here; use "cpu"'):
        choose("cuda:1")


def test_auto_is_the_first_gpu_that_works_and_says_why(two_gpus):
    found = choose("auto")
    assert found.device == torch.device("cuda", 1)
    assert found.notes == ("cuda:0 (GPU 0) is not used: its kernels fail", "computed on cuda:1 (GPU 1)")


def test_a_device_by_name_is_never_replaced(two_gpus):
    with pytest.raises(ConfigError, match="its kernels fail"):
        choose("cuda")
    with pytest.raises(ConfigError, match="2 CUDA GPUs, numbered from 0"):
        choose("cuda:2")
    assert choose("cuda:1").device.index == 1 and choose("cpu").device == CPU


def test_quantized_weights_need_triton_on_a_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(devices.backends, "explain", lambda name: "not installed")
    with pytest.raises(ConfigError, match='model.frozen = "nf4".*Triton: not installed.*"bf16" and "fp32" work'):
        choose("cuda:1", "nf4")
    with pytest.raises(ConfigError, match='model.frozen = "int8_rotated" is computed there by Triton: not installed'):
        choose("cuda:1", "int8_rotated")
    assert choose("auto", "int8").device == CPU
    assert choose("cuda:1", "bf16").device.index == 1


def test_a_gpu_stores_int8_for_int8_rotated(two_gpus, monkeypatch):
    monkeypatch.setattr(devices.backends, "explain", lambda name: None)
    assert choose("cuda:1", "int8_rotated").device.index == 1
    assert devices.format_on(torch.device("cuda", 1), "int8_rotated") == "int8"
    assert devices.format_on(CPU, "int8_rotated") == "int8_rotated" and devices.format_on(torch.device("cuda"), "nf4") == "nf4"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:-1"])
def test_a_misspelled_device_is_refused_in_the_run_file(name):
    with pytest.raises(ConfigError, match="run.device: got"):
        load_config("digits", [f"run.device={name}"])


class TestManyGpus:
    @pytest.mark.parametrize("at_once, gpus, share", [(4, 0, 0.0), (1, 2, 1.0), (2, 2, 1.0), (3, 2, 0.5), (8, 2, 0.25), (5, 4, 0.5)])
    def test_a_simulated_node_has_its_part_of_one_gpu(self, at_once, gpus, share):
        assert share_of_gpu(at_once, gpus) == share

    def test_processes_see_one_gpu_each(self, two_gpus, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert one_gpu_each("auto", "cuda") == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
        assert one_gpu_each("auto", "cuda:1") == [] == one_gpu_each("cpu")

    def test_of_those_that_the_user_left_visible(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f, 3,7")
        assert [each["CUDA_VISIBLE_DEVICES"] for each in one_gpu_each("auto")] == ["GPU-5f", "3", "7"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        assert one_gpu_each("auto") == []
