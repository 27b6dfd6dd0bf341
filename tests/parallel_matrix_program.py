"""Runs of many launches from one process: reads jobs as lines of JSON, answers each with a line of JSON.

Importing torch takes longer than a small run. So it is done once, and each rank of each run is a fork of this process,
which has no threads: they share nothing else, and what one run leaves behind or how it ends does not matter to others.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed.pipelining  # loaded here so that no run has to
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modalities_cli.wiring import checked_graph
from modalities_core.registry import register
from modalities_data.datasets.memory import InMemoryDataset
from modalities_parallel import distributed, sharding  # noqa: F401  # likewise
from modalities_parallel.checkpoint import transfer  # noqa: F401

CONFIG = Path(__file__).with_name("parallel_matrix.yaml")


@register("dataset.made_up")
def made_up(
    sequence_length: int, samples: int, seed: int = 0, masked: bool = False, separate: bool = False
) -> InMemoryDataset:
    """Ids that follow each other by a rule with exceptions, in documents of any length.

    Args:
        sequence_length: target tokens per sample.
        samples: how many there are.
        seed: of all that is drawn.
        masked: whether many tokens count little or nothing.
        separate: whether samples tell where documents begin.
    """
    drawn = np.random.default_rng(seed)
    count = samples * sequence_length + 1
    tokens = drawn.integers(0, 97, count)
    follows = drawn.random(count) < 0.7
    for place in range(1, count):
        if follows[place]:
            tokens[place] = (3 * tokens[place - 1] + 1) % 97
    mask = drawn.random(count) * (drawn.random(count) < 0.6)
    ends = np.unique(np.append(drawn.integers(1, count, count // 11), count))
    lengths = np.diff(ends, prepend=0)
    return InMemoryDataset(tokens, sequence_length, mask if masked else None, lengths if separate else None)


def train(
    folder: str,
    overrides: list[str],
    config: str | Path = CONFIG,
    reference: str | None = None,
    weights: str | None = None,
) -> dict:
    """One rank of one run; how far its tensors are from a reference's, relative to the largest element."""
    graph = checked_graph(Path(config), overrides)
    trainer = graph.build("trainer")
    trainer.run(Path(folder))
    model, world = trainer.executor.model, trainer.world
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    kept = model.state_dict().keys()
    tensors = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]
    found = {name: whole(value) for name, value in tensors}
    if weights is not None and world.rank == 0:
        np.savez(weights, **found)
    answer: dict = {"sharded": all(isinstance(p, DTensor) for p in model.parameters())}
    if reference is not None:
        expected = np.load(reference)
        answer["off"] = {name: distance(value, expected[name]) for name, value in found.items()}
    world.close()
    return answer


def whole(parameter: torch.Tensor) -> np.ndarray:
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return value.detach().numpy()


def distance(value: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest element.

    Or of a hundredth, what one step changes: the bias of keys has no gradient but rounding, and stays about zero.
    """
    assert value.shape == expected.shape, f"{value.shape} instead of {expected.shape}"
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 0.01))


def launch(ranks: int, folder: str, timeout: float, copy: str | None = None, **arguments) -> dict:
    """Run ``train`` in ``ranks`` forks, or, for 0, in one that no launcher has started.

    Args:
        ranks: of the launch.
        folder: of the run.
        timeout: seconds until its processes are killed.
        copy: a checkpoint that is put into ``folder`` before.
        arguments: of ``train``.
    """
    place = Path(folder)
    place.mkdir(parents=True)
    if copy is not None:
        shutil.copytree(copy, place / "checkpoints" / Path(copy).name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [fork(rank, ranks, port, place, arguments) for rank in range(max(ranks, 1))]
    codes = wait(children, time.monotonic() + timeout)
    logs = {rank: (place / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(len(children))}
    results = [place / f"rank-{rank}.json" for rank in range(len(children))]
    return {
        "codes": codes,
        "results": [json.loads(path.read_text()) if path.exists() else None for path in results],
        "logs": {rank: log[-4000:] for rank, log in logs.items()},
    }


def fork(rank: int, ranks: int, port: int, folder: Path, arguments: dict) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_PORT": str(port)})
        torch.use_deterministic_algorithms(True)
        answer = train(str(folder), **arguments)
        (folder / f"rank-{rank}.json").write_text(json.dumps(answer))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads sometimes abort an interpreter that tears itself down


def wait(children: list[int], deadline: float) -> list[int]:
    """Exit codes, negative for signals; once one has failed the others are given a moment to say why."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] != 0:
                    deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    # Whatever a run will load, so that it need not; and set apart, so that no run copies it by looking for garbage.
    checked_graph(CONFIG)
    gc.collect()
    gc.freeze()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(launch(**json.loads(line))), flush=True)
