"""From a micro batch in one process to one rank's share of it under tensor, context and pipeline parallelism."""

from __future__ import annotations

from typing import NamedTuple

from modalities_parallel.planning.layout import Layout, RankPart
from modalities_parallel.planning.trace import Trace
from modalities_parallel.planning.traffic import Traffic


class Share(NamedTuple):
    """Bytes that a rank holds of its micro batches, beside weights and their gradients.

    activations: from forward to backward, of all micro batches under way.
    loss: that head and loss hold at most.
    backward: more than both that the backward pass holds.
    """

    activations: int
    loss: int
    backward: int


def rank_share(traced: Trace, traffic: Traffic, layout: Layout, part: RankPart, blocks: int, steps: StepShape) -> Share:
    """What the ranks that have ``part`` hold of the micro batches.

    Outside of regions tensors are of T / (cp tp) tokens; inside their features or heads are split as well, so all count
    1 / (cp tp) (arXiv:2205.05198). Only what a region is given is whole over the ranks of tp, as it was gathered, and
    stays until the gradient of its weights is known. What context parallelism brings back from heads to tokens is kept
    beside what attention gave. Logits have 1 / tp of the vocabulary.

    Args:
        traced: of the whole model and micro batch in one process.
        traffic: of it.
        layout: of tensors on ranks.
        part: of the model.
        blocks: of the whole model.
        steps: of the run.
    """
    d = layout.degrees
    ways = d.tp * d.cp
    held = part.blocks / max(1, blocks)
    gathered = [size / d.cp - size / ways for size in traffic.regions]
    returned = [size / ways for size in traffic.attended] if d.cp > 1 else []
    # Experts are given whole features of every token that comes to them.
    inside = [2 * (size / d.cp - size / ways) for size in traffic.rows]
    kept = 0.0 if steps.recomputed else sum(gathered) + sum(returned) + sum(inside)
    one = held * (traced.activations / ways + kept)
    largest = [max(sizes, default=0) for sizes in (gathered, returned, inside)]
    # A region's gathered tokens and their gradient, and what running a block again gathers.
    passing = 2 * largest[0] + largest[2] + (sum(largest) if steps.recomputed else 0)
    loss = 0.0
    if part.last:
        loss = traced.loss / (ways if steps.whole_logits else d.tp)
        loss += 2 * (traffic.block / d.cp - traffic.block / ways)
    return Share(
        round(one * under_way(layout, part, steps.micro_batches)), round(loss), round(traced.backward / ways + passing)
    )


class StepShape(NamedTuple):
    """What of a step decides what is held at once.

    micro_batches: of each data-parallel rank.
    recomputed: whether blocks run again in backward.
    whole_logits: whether the loss takes all tokens at once.
    """

    micro_batches: int
    recomputed: bool
    whole_logits: bool


def under_way(layout: Layout, part: RankPart, micro_batches: int) -> float:
    """Micro batches whose activations the ranks that have ``part`` hold at once, of all of their blocks.

    gpipe holds all. 1f1b begins as many as there are stages from its own to the last (arXiv:2104.04473, section 2.2).
    With v stages per rank each is one of v chunks; ranks begin with 2 (p - 1 - place) + (v - 1) p + 1 of them in the
    interleaved schedule, and p - 1 - place fewer with zero_bubble, as torch.distributed.pipelining does.

    Args:
        layout: with the pipeline's degree, schedule and stages per rank.
        part: of the model.
        micro_batches: of a step.
    """
    p, v = layout.degrees.pp, layout.stages_per_rank
    if p == 1:
        return 1
    if layout.schedule == "gpipe":
        return micro_batches
    after = p - 1 - part.place
    if layout.schedule == "1f1b":
        return min(micro_batches, after + 1)
    chunks = (2 if layout.schedule == "interleaved_1f1b" else 1) * after + (v - 1) * p + 1
    return min(micro_batches, chunks / v)
