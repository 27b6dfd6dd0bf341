"""The arithmetic of batches that grow: no sample is left out or taken twice, and any step is found at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError
from modalities_data.batch_sizes import Linear, Stage, Stages, StepSamples


def stages_of(*pairs):
    return [Stage(from_step=step, samples=samples) for step, samples in pairs]


GROWING = Stages(stages_of((0, 4), (3, 8), (5, 24)))


@st.composite
def any_stages(draw):
    steps = sorted(draw(st.sets(st.integers(1, 40), max_size=6)))
    sizes = [draw(st.integers(1, 30)) for _ in range(len(steps) + 1)]
    return stages_of(*zip([0, *steps], sizes, strict=True))


@given(any_stages())
@settings(deadline=None, max_examples=200)
def test_steps_take_all_samples_one_after_the_other(stages) -> None:
    plan = StepSamples(stages)
    size_at = {stage.from_step: stage.samples for stage in stages}
    size, first = 0, 0
    for step in range(60):
        size = size_at.get(step, size)
        assert plan.samples(step) == range(first, first + size)
        assert plan.step_at(first) == step
        assert all(plan.step_at(within) is None for within in range(first + 1, first + size))
        first += size


def test_far_steps_cost_nothing() -> None:
    plan = StepSamples(stages_of((0, 64), (1000, 128), (10**9, 512)))
    assert plan.samples(10**12).start == 64_000 + 128 * (10**9 - 1000) + 512 * (10**12 - 10**9)
    assert plan.step_at(plan.samples(10**12).start) == 10**12


@pytest.mark.parametrize(("samples", "increment", "steps", "final"), [(4, 4, 10, 32), (6, 5, 3, 16), (8, 3, 7, 8)])
def test_linear_growth_is_even_and_ends_in_time(samples, increment, steps, final) -> None:
    plan = StepSamples(Linear(samples, increment, steps).until(final))
    sizes = [len(plan.samples(step)) for step in range(steps + 5)]
    assert sizes[0] == samples
    assert sizes[steps:] == [final] * 5
    if samples < final:
        assert sizes[steps - 1] == final - increment
    for step, size in enumerate(sizes[: steps + 1]):
        # Never above the straight line, and less than an increment below it.
        line = samples + (final - samples) * step / steps
        assert line - increment < size <= line + 1e-9


def test_what_does_not_lead_to_the_final_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the last stage has 24 .* samples_per_step is 32") as caught:
        GROWING.until(32)
    assert "{from_step: STEP, samples: 32}, STEP beyond 5" in caught.value.hint
    assert caught.value.about == (GROWING, "stages")
    with pytest.raises(ConfigError, match="6 samples do not become 32 in increments of 4") as caught:
        Linear(6, 4, 10).until(32)
    assert caught.value.hint == "the nearest to start with: 4 or 8"
    with pytest.raises(ConfigError, match="do not become 32") as caught:
        Linear(40, 64, 10).until(32)
    assert caught.value.hint == "the nearest to start with: 32"
    with pytest.raises(ConfigError, match="7 increments of 4 samples take more than 6 steps"):
        Linear(4, 4, 6).until(32)


@pytest.mark.parametrize(
    ("build", "argument", "message"),
    [
        (lambda: Stages([]), "stages", "first stage begins at step 0"),
        (lambda: Stages(stages_of((5, 4))), "stages", "first stage begins at step 0"),
        (lambda: Stages(stages_of((0, 4), (5, 8), (5, 9))), "stages", "from step 5 cannot follow one from step 5"),
        (lambda: Stages(stages_of((0, 8), (5, 4))), "stages", "a stage of 4 samples cannot follow one of 8"),
        (lambda: Stages(stages_of((0, 0))), "stages", "at least 1, not 0 as in the stage from step 0"),
        (lambda: Linear(0, 1, 1), "samples", "at least 1, not 0"),
        (lambda: Linear(1, 0, 1), "increment", "at least 1, not 0"),
        (lambda: Linear(1, 1, 0), "steps", "at least 1, not 0"),
    ],
)
def test_plans_that_make_no_sense_are_refused(build, argument, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build()
    assert caught.value.about[1] == argument
