"""The fastest square matrix products of the device in bfloat16, and one size in float32, in FLOP/s: SPEC."""

import json
import time

import torch
from clock import spec

SIZES = {"cpu": (1024, 1536, 2048), "cuda": (4096, 8192, 16384)}
SECONDS = 0.7


def best(size, device, dtype=torch.bfloat16):
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        left @ right
    found, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        wait()
        began = time.perf_counter()
        left @ right
        wait()
        found.append(time.perf_counter() - began)
    return 2 * size**3 / min(found)


def main():
    device = spec()["device"]
    rates = {size: best(size, device) for size in SIZES[device]}
    told = {"flops": max(rates.values()), "sizes": rates, "threads": torch.get_num_threads(), "sheet": None}
    told["fp32_flops"] = best(SIZES[device][0], device, torch.float32)
    if device == "cuda":
        from modalities_core.training.peak import dense_peak

        told |= {"name": torch.cuda.get_device_name(), "sheet": dense_peak(torch.cuda.get_device_name())}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
