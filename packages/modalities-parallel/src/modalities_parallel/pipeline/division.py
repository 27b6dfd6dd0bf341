"""Which blocks make a stage, and which rank holds it."""

from __future__ import annotations

from collections.abc import Sequence


def divide(costs: Sequence[float], stages: int, last_extra: float = 0.0) -> list[range]:
    """Contiguous runs of blocks, none of them empty, whose dearest is as cheap as can be.

    Among divisions with an equally cheap dearest stage the most even one is taken, and then the one whose first stages
    hold more blocks.

    Args:
        costs: of each block, in the order of the model.
        stages: how many runs; at most as many as blocks.
        last_extra: what the last stage costs beside its blocks, such as the output head.

    Returns:
        The places of each stage's blocks.
    """
    count = len(costs)
    assert 1 <= stages <= count, "a stage has at least one block"
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def load(start: int, end: int, stage: int) -> float:
        return before[end] - before[start] + (last_extra if stage == stages - 1 else 0.0)

    # best[end] is (dearest, sum of squares, where each stage so far begins) of the first blocks up to ``end``.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            options = []
            for start, (dearest, squares, starts) in best.items():
                if start < end:
                    own = load(start, end, stage)
                    options.append((max(dearest, own), squares + own * own, (*starts, start)))
            found[end] = min(options, key=lambda option: (option[0], option[1], tuple(-start for start in option[2])))
        best = found
    starts = (*best[count][2], count)
    return [range(starts[stage], starts[stage + 1]) for stage in range(stages)]


def held_stages(place: int, ranks: int, stages_per_rank: int) -> list[int]:
    """The stages of the rank at ``place`` of a pipeline: every ``ranks``-th, from its own place on.

    Args:
        place: of the rank along the pipeline.
        ranks: of the pipeline.
        stages_per_rank: how often the pipeline goes round.
    """
    return [place + turn * ranks for turn in range(stages_per_rank)]
