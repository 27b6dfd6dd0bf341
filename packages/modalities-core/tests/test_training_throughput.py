"""Stopwatch, MFU and the table of peaks."""

import pytest
import torch
from training_parts import TinyModel, summed_cross_entropy

from modalities_core.training.efficiency import Efficiency, time_split
from modalities_core.training.executor import Plain
from modalities_core.training.matmul import MeasuredPeak, measured_peak
from modalities_core.training.memory import memory, most_relevant
from modalities_core.training.peak import DENSE_PEAKS, computing_dtype, dense_peak, device_peak
from modalities_core.training.throughput import Stopwatch, Window, mfu
from modalities_core.training.world import Alone


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_window_leaves_out_evaluation_and_saving():
    clock = Clock()
    watch = Stopwatch(clock)
    for _ in range(4):
        clock.now += 1.5
        watch.step_done()
    with watch.excluded():
        clock.now += 100
    window = watch.window()
    assert window == Window(steps=4, seconds=6.0)
    clock.now += 2.0
    assert watch.window() == Window(steps=0, seconds=2.0)


def test_mfu_of_a_printed_example():
    # Llama-3-8B at 8192 tokens is 57.9 GFLOP per token: 10,000 tokens/s on one H100 are 58.5 %.
    assert mfu(10_000, 57.9e9, 989e12, 1) == pytest.approx(0.585, abs=5e-4)
    assert mfu(80_000, 57.9e9, 989e12, 8) == pytest.approx(0.585, abs=5e-4)
    assert mfu(10_000, 51.5e9, 989e12, 1) == pytest.approx(0.521, abs=5e-4)
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
        ("NVIDIA H20", 148e12),
        ("NVIDIA A30", 165e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD Instinct MI300X VF", 1307.4e12),
        ("AMD Instinct MI325X", 1307.4e12),
        ("AMD Instinct MI355X", 2516.6e12),
        ("AMD Instinct MI250X / MI250", 191.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 9999", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Quadro RTX 6000", None),
    ],
)
def test_peaks(name, peak):
    assert dense_peak(name) == peak


def test_no_peak_of_the_table_hides_another():
    for part, peak in DENSE_PEAKS:
        assert dense_peak(f"Maker {part}") == peak


def test_cpu_peak_is_measured_once_and_only_rises():
    cpu = torch.device("cpu")
    peak = device_peak(cpu, torch.float32)
    assert isinstance(peak, MeasuredPeak)
    assert device_peak(cpu, torch.float32) is peak
    assert measured_peak(cpu, torch.bfloat16) is not peak
    first = peak.flops
    assert first > 1e8
    peak.measure(0.01)
    assert peak.flops >= first
    assert device_peak(torch.device("meta"), torch.float32) is None


def test_measuring_again_takes_a_five_hundredth_of_the_run():
    peak = MeasuredPeak(torch.device("cpu"), torch.float32)
    peak.measure(0.01)
    peak.flops = 1.0
    peak.measure_again(100)
    assert peak.flops == 1.0
    peak.measure_again(500)
    assert peak.flops > 1e8


class Fast(TinyModel):
    """So much arithmetic per token that no CPU can do it."""

    def flops_per_token(self, sequence_length):
        return 1e15

    def causal_flops_per_token(self, sequence_length):
        return 8e14


def test_no_mfu_is_above_what_was_ever_reached():
    executor = Plain(Fast(), summed_cross_entropy, Alone("cpu"))
    efficiency = Efficiency(executor, executor.world, 6)
    measures = efficiency.measures(tokens=1000, seconds=0.5)
    assert measures["tokens_per_second"] == measures["tokens_per_second_per_device"] == 2000
    assert (measures["mfu"], measures["mfu_causal"]) == pytest.approx((1.0, 0.8))
    assert measures["peak_flops"] == pytest.approx(2e18)
    assert measures["peak_measured"]
    assert efficiency.measures(tokens=500, seconds=0.5)["mfu"] == pytest.approx(0.5)
    measured_peak(torch.device("cpu"), torch.float32).flops = 0.0  # others measure it too


def test_peak_is_that_of_the_dtype_in_use():
    model = TinyModel()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"), precision="fp32")
    assert computing_dtype(executor) is torch.float32
    # As parallel.fsdp2 marks a model whose forward is in mixed precision.
    model.computing_dtype = torch.bfloat16
    assert computing_dtype(executor) is torch.bfloat16
    for precision, dtype in [("bf16_weights", torch.bfloat16), ("fp16", torch.float16)]:
        executor.precision = precision
        assert computing_dtype(executor) is dtype


def test_time_split_adds_up():
    split = time_split({"forward": 2.0, "data": 0.5}, 4.0, 2)
    assert split == {"forward": 1.0, "data": 0.25, "other": 0.75, "step": 2.0}
    split = time_split({"forward": 3.0, "data": 1.5}, 4.0, 2)
    assert sum(split.values()) == pytest.approx(2 * split["step"])
    assert split["other"] == pytest.approx(0)
    assert time_split({}, 3.0, 1) == {"other": 3.0, "step": 3.0}


def test_resident_set_is_plausible():
    found = memory(torch.device("cpu"))
    assert 50e6 < found["resident"] <= found["peak_resident"]
    kept = torch.ones(100_000_000, dtype=torch.uint8)
    more = memory(torch.device("cpu"))
    assert more["resident"] - found["resident"] > 0.5 * len(kept)
    assert more["peak_resident"] >= found["peak_resident"]
    assert most_relevant(more) == more["resident"]
