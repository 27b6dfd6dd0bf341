"""What every driver measures alike: the first step, the steps that count, the loss at both ends, and memory.

The device is waited for at the start and the end of what counts, and nowhere between.
"""

import json
import sys
import time
from pathlib import Path

import torch


def spec():
    """What the bench asks for: the first argument is a file of JSON."""
    return json.loads(Path(sys.argv[1]).read_text())


class Clock:
    """Tell it after each step."""

    def __init__(self, spec):
        self.warmup, self.steps, self.cuda = spec["warmup"], spec["steps"], spec["device"] == "cuda"
        self.tokens_per_step = spec["samples_per_step"] * spec["shape"]["sequence_length"]
        self.count, self.losses, self.marks = 0, {}, {}

    def start(self):
        self.marks[0] = time.perf_counter()

    def step(self, loss=None):
        """One more step is done; ``loss`` is its mean loss, a tensor that is not looked at before the end."""
        self.count += 1
        if self.count in (1, self.warmup, self.warmup + self.steps):
            if self.cuda:
                torch.cuda.synchronize()
            self.marks[self.count] = time.perf_counter()
        if loss is not None:
            self.losses[self.count] = loss

    def done(self):
        return self.count >= self.warmup + self.steps

    def tell(self, **more):
        """Print the result, the last line of the driver."""
        seconds = self.marks[self.warmup + self.steps] - self.marks[self.warmup]
        losses = [float(loss) for _, loss in sorted(self.losses.items())]
        print(json.dumps({
            "tokens_per_second": self.steps * self.tokens_per_step / seconds, "step_ms": 1e3 * seconds / self.steps,
            "first_step": self.marks[1] - self.marks[0], "first_loss": losses[0], "last_loss": losses[-1],
            "tokens_per_step": self.tokens_per_step, "device_bytes": device_bytes(self.cuda), **more,
        }))  # fmt: skip


def device_bytes(cuda):
    return torch.cuda.max_memory_allocated() if cuda else 0


def parameters(model):
    """How many a model has; tied ones count once."""
    return sum(value.numel() for value in model.parameters())
