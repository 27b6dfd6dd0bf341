"""The tables of packages/modalities-parallel/docs/scaling.md: 8B and 70B on 1 to 4096 H100, by ``modalities plan``.

python tools/plan_scaling.py > table.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from modalities_cli.plan import built
from modalities_core.errors import ConfigError
from modalities_parallel.mesh import Degrees
from modalities_parallel.planning.devices import DEVICES
from modalities_parallel.planning.refusals import refuse
from modalities_parallel.planning.run import Estimate, PlannedRun, Recomputation, estimated

CONFIG = Path(__file__).resolve().parent.parent / "config_files" / "llama_1b_fsdp.yaml"
COMMON = ("model.model.preset=llama3-8b", "model.model.vocab_size=128256", "settings.sequence_length=8192")
MODELS = {
    "8B": (),
    "70B": (
        "model.model.hidden_size=8192",
        "model.model.layers=80",
        "model.model.heads=64",
        "model.model.head_size=128",
        "model.model.intermediate_size=28672",
    ),
}
RECOMPUTATION: dict[str, Recomputation] = {"8B": "selective", "70B": "whole_blocks"}
RECOMPUTATIONS: tuple[Recomputation, ...] = ("as configured", "selective", "whole_blocks")
DEVICE_COUNTS = (1, 8, 64, 512, 4096)
GROUP = 64
"""Devices that share one copy of the model, where the table says HSDP."""
STEP = 512
"""Sequences of 8192 tokens, 4.2 million, where the batch does not grow with the devices."""
WAYS = (1, 2, 4, 8)
GROUPS = (64, 4096)
"""Devices that share one copy of a stage, at most."""
H100 = DEVICES["h100"]
LIMIT = 0.9 * H100.memory
"""What is left for tensors beside CUDA, NCCL and the gaps between allocations."""


def planned(name: str) -> PlannedRun:
    """The model on one device, one sequence at a time; every other run of it is a variant."""
    batch = (f"trainer.batches.samples_per_step={STEP}", "settings.micro_batch_size=1")
    return built(CONFIG, (*COMMON, *MODELS[name], *batch), 1)


def on(run: PlannedRun, degrees: Degrees, samples: int, recomputation: Recomputation = "as configured") -> PlannedRun:
    """The same model on a mesh, in bfloat16, sharded where there is more than one device."""
    layout = run.layout._replace(degrees=degrees, wrapped=degrees.ranks > 1, reshard=degrees.pp == 1)
    return replace(run, layout=layout, samples_per_step=samples, recomputation=recomputation)


def meshes(devices: int) -> Iterator[Degrees]:
    """All of these many devices in powers of two, tensor parallelism within a node."""
    for pp, cp, tp in product(WAYS, WAYS, WAYS):
        left = devices // (pp * cp * tp)
        if not left:
            continue
        for group in {min(left, max(1, size // (cp * tp))) for size in GROUPS}:
            yield Degrees(pp, left // group, group, cp, tp)


def fitting(run: PlannedRun, devices: int) -> list[tuple[PlannedRun, Estimate]]:
    """Every mesh that can take the step and fits, with as little recomputation as memory asks for."""
    found: list[tuple[PlannedRun, Estimate]] = []
    for mesh in meshes(devices):
        if STEP % (mesh.dp_replicate * mesh.dp_shard):
            continue
        variant = on(run, mesh, STEP)
        try:
            refuse(variant.model, variant.layout, variant.sequence_length, variant.accumulation)
        except ConfigError:
            continue
        for recomputation in RECOMPUTATIONS:
            variant = replace(variant, recomputation=recomputation)
            estimate = estimated(variant, H100)
            if estimate.memory.total <= LIMIT:
                found.append((variant, estimate))
                break
    return found


def fastest(found: list[tuple[PlannedRun, Estimate]], axes: str) -> tuple[PlannedRun, Estimate] | None:
    """The fastest of those that use at most these axes beside the ones of data parallelism."""
    other = [axis for axis in ("pp", "cp", "tp") if axis not in axes.split()]
    some = [one for one in found if all(getattr(one[0].layout.degrees, axis) == 1 for axis in other)]
    return max(some, key=lambda one: one[1].mfu, default=None)


def main() -> None:
    """Print two tables per model."""
    for name in MODELS:
        run = planned(name)
        print(f"\n### {name}, one sequence per device\n")
        print("| devices | mesh | memory | step | hidden communication | exposed | tokens/s per device | MFU |")
        print("|---|---|---|---|---|---|---|---|")
        for devices in DEVICE_COUNTS:
            for replicas in dict.fromkeys((1, max(1, devices // GROUP))):
                mesh = Degrees(1, replicas, devices // replicas)
                variant = on(run, mesh, devices, recomputation=RECOMPUTATION[name])
                print(row(variant, estimated(variant, H100)))
        print(f"\n### {name}, {STEP} sequences per step\n")
        print("| devices | mesh | memory | step | exposed | bubble | tokens/s per device | MFU |")
        print("|---|---|---|---|---|---|---|---|")
        for devices in DEVICE_COUNTS[2:]:
            shown: set[Degrees] = set()
            found = fitting(run, devices)
            for axes in ("", "tp", "pp", "cp", "tp pp cp"):
                best = fastest(found, axes)
                if best is None and not axes:
                    print(f"| {devices} | data parallelism alone | no mesh can take the step and fits | | | | | |")
                elif best is not None and best[0].layout.degrees not in shown:
                    shown.add(best[0].layout.degrees)
                    print(fixed_row(*best))


def row(run: PlannedRun, estimate: Estimate) -> str:
    """One line of a table in which the batch grows with the devices."""
    time = estimate.time
    return _cells(run, estimate, f"{time.communication - time.exposed:.3f} s", f"{time.exposed:.3f} s")


def fixed_row(run: PlannedRun, estimate: Estimate) -> str:
    """One line of a table in which it does not."""
    return _cells(run, estimate, f"{estimate.time.exposed:.3f} s", f"{estimate.time.bubble:.3f} s")


def _cells(run: PlannedRun, estimate: Estimate, *seconds: str) -> str:
    mesh = str(run.layout.degrees).removeprefix("dp_replicate 1 x ").replace(" x dp_replicate 1", "")
    again = {"as configured": "", "selective": ", selective", "whole_blocks": ", blocks"}[run.recomputation]
    fits = "" if estimate.memory.total <= H100.memory else " (does not fit)"
    cells = (
        f"{run.ranks}",
        mesh + again,
        f"{estimate.memory.total / 1e9:.1f} GB{fits}",
        f"{estimate.time.total:.3f} s",
        *seconds,
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
