"""Stopwatch, MFU and the table of peaks."""

import pytest
import torch

from modalities_core.training.peak import bf16_peak, measured_cpu_peak, peak_flops
from modalities_core.training.throughput import Stopwatch, memory_bytes, mfu


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_window_leaves_out_evaluation_and_saving():
    clock = Clock()
    watch = Stopwatch(clock)
    for _ in range(4):
        clock.now += 1.0
        with watch.waiting_for_data():
            clock.now += 0.5
        watch.step_done()
    with watch.excluded():
        clock.now += 100
    window = watch.window()
    assert (window.steps, window.seconds, window.data_seconds) == (4, 6.0, 2.0)
    assert window.tokens_per_second(300) == 200
    assert watch.window().tokens_per_second(300) == 0


def test_mfu_of_a_printed_example():
    # Llama-3-8B at 8192 tokens is 57.9 GFLOP per token: 10,000 tokens/s on one H100 are 58.5 %.
    assert mfu(10_000, 57.9e9, 989e12, 1) == pytest.approx(0.585, abs=5e-4)
    assert mfu(80_000, 57.9e9, 989e12, 8) == pytest.approx(0.585, abs=5e-4)
    assert mfu(10_000, 57.9e9, None, 1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_peaks(name, peak):
    assert bf16_peak(name) == peak


def test_cpu_peak_is_measured_once():
    first = peak_flops(torch.device("cpu"), torch.float32)
    assert first > 1e8
    assert peak_flops(torch.device("cpu"), torch.float32) == first
    assert measured_cpu_peak.cache_info().hits >= 1
    assert peak_flops(torch.device("meta")) is None


def test_resident_set_is_plausible():
    assert memory_bytes(torch.device("cpu")) > 50e6
