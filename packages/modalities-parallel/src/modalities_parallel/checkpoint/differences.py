"""What a checkpoint and a run disagree about, as a table."""

from __future__ import annotations

from modalities_core.errors import CheckpointError
from modalities_parallel.checkpoint.layout import Layout

ROWS = 20


def refuse_differences(saved: Layout, wanted: Layout, folder: object) -> None:
    """Make sure that a checkpoint holds what is to be loaded, no more, no less, and of the same kind.

    Args:
        saved: tensors of the checkpoint.
        wanted: tensors of the run.
        folder: of the checkpoint, for the message.

    Raises:
        CheckpointError: names, shapes or dtypes differ, with a table of what.
    """
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if not differing:
        return
    counts = {
        "missing in the checkpoint": len(wanted.keys() - saved.keys()),
        "unknown to this run": len(saved.keys() - wanted.keys()),
        "of another shape or dtype": sum(name in saved and name in wanted for name in differing),
    }
    summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    rows = [("tensor", "checkpoint", "this run")]
    rows += [(name, _kind(saved, name), _kind(wanted, name)) for name in differing[:ROWS]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(differing) > ROWS:
        table.append(f"and {len(differing) - ROWS} more")
    raise CheckpointError(
        f"the checkpoint in {folder} does not fit this run: {summary}\n" + "\n".join(f"    {line}" for line in table),
        hint="load it with the model and optimizer it was saved from; nothing was changed by this attempt",
    )


def _kind(layout: Layout, name: str) -> str:
    if name not in layout:
        return "-"
    shape, dtype = layout[name]
    return f"{dtype} {list(shape)}"
