"""What the loaders' drivers share: reading samples for a while on one core, and telling how it went."""

import json
import time

SECONDS = 1.5
PARTS = 30
BATCH = 32


def samples_per_second(read, length, seconds=SECONDS, batch=BATCH):
    """Samples per CPU second of ``read(indices)`` on random indices, drawn before the clock starts.

    The best of many short parts: what other work takes from the caches must not count against a loader.
    """
    import numpy as np

    indices = np.random.default_rng(1).integers(0, length, 1 << 16)
    batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    for one in batches[:8]:
        read(one)
    best = 0.0
    position = 0
    for _ in range(PARTS):
        done = 0
        began = time.process_time()
        while (spent := time.process_time() - began) < seconds / PARTS:
            read(batches[position % len(batches)])
            position += 1
            done += batch
        best = max(best, done / spent)
    return best


def batches_of(loader):
    """A ``read`` for the batches a loader makes itself, epoch after epoch."""
    found = iter(())

    def read(_):
        nonlocal found
        try:
            return next(found)
        except StopIteration:
            found = iter(loader)
            return next(found)

    return read


def tell(**facts):
    """One line of JSON, the last of the output."""
    print(json.dumps(facts))
