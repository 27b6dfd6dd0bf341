"""What a decoder tells about its parts, so that any parallelism can be applied from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modalities_core.interfaces import ParallelPlan

if TYPE_CHECKING:
    from modalities_models.decoder import Decoder

SPARSE = "feedforward.expert_parameters"


def decoder_plan(model: Decoder) -> ParallelPlan:
    """Every block is one unit; attention is split by heads, feed-forwards by their intermediate size.

    Of a mixture every expert is split, and so is what all tokens pass through; the router stays whole. Or its experts
    are shared out as they are.
    """
    a = model.architecture
    norms = ("attention.query_norm", "attention.key_norm") if a.query_key_norm == "projection" else ()
    feedforwards = ("feedforward", "feedforward.shared")
    into = [f"{inner}.{name}" for inner in feedforwards for name in ("gate", "up")]
    return ParallelPlan(
        blocks=("blocks.*",),
        column=_present(model, "attention.query", "attention.key", "attention.value", *into),
        row=_present(model, "attention.output", *(f"{inner}.down" for inner in feedforwards)),
        attention=("blocks.*.attention",),
        head_size=a.head_size,
        column_norms=_present(model, *norms),
        embeddings=("embedding",) if model.positions is None else ("embedding", "positions"),
        # One by one: a decoder may have dense blocks as well.
        experts=tuple(f"blocks.{n}.feedforward" for n, b in enumerate(model.blocks) if _has(b, SPARSE)),
    )


def _present(model: Decoder, *names: str) -> tuple[str, ...]:
    """Globs of those layers and parameters that any block has."""
    return tuple(f"blocks.*.{name}" for name in names if any(_has(block, name) for block in model.blocks))


def _has(module: object, name: str) -> bool:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module is not None
