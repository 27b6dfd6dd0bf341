"""A training loop as one writes it by hand: random windows of a token file, autocast, clipping, fused AdamW."""

import contextlib

import numpy as np
import torch
from clock import Clock


def optimizer_of(model, lr):
    """AdamW with decay on matrices, in one kernel."""
    matrices = [value for value in model.parameters() if value.dim() >= 2]
    vectors = [value for value in model.parameters() if value.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95), fused=True)


def batches(spec):
    """Pairs of inputs and targets, (B, T) int64 on the device, for ever."""
    data = np.memmap(f"{spec['data']}/00000.bin", spec["dtype"], "r")
    length, device = spec["shape"]["sequence_length"], spec["device"]
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(data) - length - 1, (spec["micro_batch_size"],), generator=generator).tolist()
        windows = torch.from_numpy(np.stack([data[at : at + length + 1] for at in starts]).astype(np.int64))
        if device == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def train(spec, model, loss_of, optimizer=None, **more):
    """Train and tell.

    Args:
        spec: what the bench asks for.
        model: on the device; compiled in here if the spec says so.
        loss_of: from the model, inputs and targets to the mean loss.
        optimizer: AdamW on all parameters if None.
        more: goes into what is told.
    """
    if spec["device"] == "cuda":
        torch.set_float32_matmul_precision("high")
    if spec["weights"] == "bf16":
        model.bfloat16()
    optimizer = optimizer or optimizer_of(model, spec["lr"])
    accumulation = spec["samples_per_step"] // spec["micro_batch_size"]
    running = torch.compile(model) if spec["compile"] else model
    autocast = contextlib.nullcontext
    if spec["precision"] == "bf16" and spec["weights"] == "fp32":
        autocast = lambda: torch.autocast(spec["device"], torch.bfloat16)  # noqa: E731
    data, clock = batches(spec), Clock(spec)
    clock.start()
    while not clock.done():
        total = 0.0
        for _ in range(accumulation):
            tokens, targets = next(data)
            with autocast():
                loss = loss_of(running, tokens, targets) / accumulation
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step(total)
    clock.tell(**more)
