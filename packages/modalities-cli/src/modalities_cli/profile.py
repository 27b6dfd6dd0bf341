"""``modalities profile``: where the time of a run's steps goes."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_core.config.graph import Graph
    from modalities_core.events import Event, StepLogged
    from modalities_core.interfaces import Training
    from modalities_core.training.trainer import Trainer

PARTS = ("data", "forward", "backward", "optimizer", "other")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps to time, and to profile.")
@click.option("--warmup", type=click.IntRange(1), default=2, show_default=True, help="Steps before, at least.")
@click.option("--ranks", default="0", show_default=True, help="Ranks that record, as in 0,3; or all.")
@click.option("--memory", is_flag=True, help="Record memory per operation, and on a GPU a snapshot of allocations.")
@click.option("--rows", type=click.IntRange(1), default=20, show_default=True, help="Operations in the table.")
@click.option("--folder", type=click.Path(path_type=Path), help="For the traces.  [default: profiles/<name of CONFIG>]")
def profile(
    config: Path,
    overrides: tuple[str, ...],
    steps: int,
    warmup: int,
    ranks: str,
    memory: bool,
    rows: int,
    folder: Path | None,
) -> None:
    """Take a few steps of the run that CONFIG describes, and tell where their time goes.

    After warming up, --steps steps are timed without the profiler: data, forward, backward, optimizer and the rest.
    The next --steps steps are recorded with it, for a table of the costliest operations and a trace to look at. Nothing
    is evaluated, saved or sent to a sink, and no folder of a run is touched. Under torchrun every rank runs this
    command.

    \b
    Example:
        modalities profile config_files/quickstart.yaml trainer.batches.micro_batch_size=4 --steps 5
    """
    from modalities_cli.wiring import with_trainer

    def profiled(graph: Graph, trainer: Trainer) -> None:
        chosen = range(trainer.world.size) if ranks == "all" else _numbers(ranks)
        _profile(trainer, steps, warmup, tuple(chosen), memory, rows, folder or Path("profiles") / config.stem)

    with_trainer(config, overrides, profiled)


def _profile(
    trainer: Trainer, steps: int, warmup: int, ranks: tuple[int, ...], memory: bool, rows: int, folder: Path
) -> None:
    import tempfile

    from modalities_core.errors import ConfigError
    from modalities_core.training.profiling import Profile

    # The timed steps are exactly one interval between two reports.
    timed = math.ceil(warmup / steps) * steps + steps
    last = timed + steps
    if trainer.steps < last:
        raise ConfigError(
            f"the run has {trainer.steps} steps, its profile takes {last}",
            hint="profile fewer steps with --steps and --warmup, or raise the run's",
            about=(trainer, "steps"),
        )
    seen = Seen(timed)
    # Everything else stays as it is, such as the length of the run, which decides what is worth compiling.
    trainer.evaluations, trainer.checkpoints, trainer.non_finite = (), None, "stop"
    trainer.log_every, trainer.sinks = steps, (seen,)
    window = Profile(timed + 1, steps, ranks, memory, rows, folder)
    trainer.hooks = (window, End(last))
    if trainer.world.rank == 0:
        click.echo(f"steps 1 to {timed - steps} warm up, {timed - steps + 1} to {timed} are timed, ", nl=False)
        click.echo(f"{timed + 1} to {last} profiled")
    with tempfile.TemporaryDirectory() as temporary, suppress(WindowDone):
        trainer.run(Path(temporary))
    if trainer.world.rank == 0:
        _report(seen, timed + 1, ranks, memory, folder)


class WindowDone(Exception):
    """All steps that were asked for have been taken."""


class End:
    """A hook that ends the run after a step.

    Args:
        last: that step.
    """

    def __init__(self, last: int) -> None:
        self.last = last

    def start(self, training: Training) -> None:
        """Nothing to prepare."""

    def after_step(self, step: int) -> None:
        """Raise WindowDone after the last step."""
        if step == self.last:
            raise WindowDone

    def close(self) -> None:
        """Nothing to let go of."""


class Seen:
    """A sink that keeps the measures of one step and the table, and shows warnings.

    Args:
        step: the one.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.logged: StepLogged | None = None
        self.table = ""

    def consume(self, event: Event) -> None:
        """Keep what the report needs."""
        from modalities_core.events import Profiled, StepLogged, Warned

        if isinstance(event, StepLogged) and event.step == self.step:
            self.logged = event
        elif isinstance(event, Profiled):
            self.table = event.table
        elif isinstance(event, Warned):
            click.echo(f"warning: {event.message}", err=True)

    def close(self) -> None:
        """Nothing is held open."""


def _report(seen: Seen, first: int, ranks: tuple[int, ...], memory: bool, folder: Path) -> None:
    assert seen.logged is not None, "the timed steps end with a report"
    for line in split(seen.logged):
        click.echo(line)
    if seen.table:
        click.echo(f"\n{seen.table}")
    names = f"step-{first:08}-rank-{ranks[0]}" if len(ranks) == 1 else f"step-{first:08}-rank-*"
    click.echo(f"\ntrace: {folder / names}.json.gz")
    click.echo("  open it at https://ui.perfetto.dev (it stays on your machine), or in chrome://tracing")
    if memory and (folder / f"step-{first:08}-rank-{ranks[0]}-memory.pickle").exists():
        click.echo(f"memory: {folder / names}-memory.pickle\n  open it at https://pytorch.org/memory_viz")


def split(event: StepLogged) -> list[str]:
    """Speed, and what share of a step each of its parts takes, as lines of text."""
    whole = event.seconds["step"]
    measured = " (peak measured)" if event.peak_measured else ""
    utilisation = "" if event.mfu is None else f", MFU {event.mfu:.1%}{measured}"
    lines = [f"{event.tokens_per_second:,.0f} tokens/s{utilisation}, {1000 * whole:,.1f} ms per step:"]
    for part in PARTS:
        if part in event.seconds:
            seconds = event.seconds[part]
            lines.append(f"  {part:<10}{1000 * seconds:>10,.2f} ms{seconds / whole:>8.1%}")
    return lines


def _numbers(ranks: str) -> list[int]:
    from modalities_core.errors import ConfigError

    try:
        return [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise ConfigError(f"--ranks {ranks} is not a list of ranks", hint="for example 0 or 0,3 or all") from None
