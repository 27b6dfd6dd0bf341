"""Choosing tokens: every filter against transformers', the draw against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, NumericalError
from modalities_models.generation import sampling as rooms
from modalities_models.generation.sampling import Sampler, Sampling, candidates, choose, penalise, uniforms

# Distinct, so that which tokens are the most likely ones is not a matter of taste.
LOGITS = st.lists(st.integers(-200, 200), min_size=2, max_size=40, unique=True).map(
    lambda numbers: torch.tensor([numbers], dtype=torch.float32) / 16
)


def probabilities(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What is sampled from, in the order of the vocabulary."""
    kept_BK, ids_BK = candidates(logits_BV, sampling)
    found_BK = kept_BK.softmax(-1)
    return found_BK if ids_BK is None else torch.zeros_like(logits_BV).scatter(1, ids_BK, found_BK)


def theirs(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The same by transformers' warpers, in the order in which its generation applies them."""
    transformers = pytest.importorskip("transformers")
    warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        logits_BV = warper(None, logits_BV)
    return logits_BV.softmax(-1)


@settings(deadline=None)
@given(
    LOGITS,
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_k=st.none() | st.integers(1, 50),
        top_p=st.none() | st.floats(0.05, 1.0),
        min_p=st.none() | st.floats(0.0, 1.0),
    ),
)
def test_the_filters_are_those_of_transformers(logits, sampling):
    ours, wanted = probabilities(logits, sampling), theirs(logits, sampling)
    # Where a sum of probabilities lies within rounding of the limit, one token more or less is as right.
    ordered = theirs(logits, Sampling(temperature=sampling.temperature, top_k=sampling.top_k)).sort().values.cumsum(-1)
    if sampling.top_p is not None and ((ordered - (1 - sampling.top_p)).abs() < 1e-5).any():
        return
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 0.99))
def test_the_nucleus_is_the_same_whatever_is_looked_at_first(logits, p):
    found = probabilities(logits, Sampling(top_p=p))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "NUCLEUS_CANDIDATES", 2)
        torch.testing.assert_close(probabilities(logits, Sampling(top_p=p)), found)


def test_the_nucleus_of_a_large_vocabulary():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    # So flat that 512 tokens fall short, then so steep that they do not.
    for factor in (0.1, 30.0):
        torch.testing.assert_close(
            probabilities(factor * logits, Sampling(top_p=0.9)), theirs(factor * logits, Sampling(top_p=0.9))
        )


@settings(deadline=None)
@given(LOGITS, st.lists(st.integers(0, 1), min_size=1, max_size=8), st.floats(0.2, 3.0))
def test_the_repetition_penalty_is_that_of_transformers(logits, seen, penalty):
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([seen])
    wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalise(logits, ids, penalty), wanted)


def test_the_penalty_knows_the_prompt_and_what_was_chosen_since():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=100.0), [[0, 1], [2]], [0, 0], 3)
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert sampler.choose([0, 1], logits.expand(2, 5)) == [2, 0]
    # In another order, and then with one of them gone.
    assert sampler.choose([1, 0], logits.expand(2, 5)) == [1, 3]
    assert sampler.choose([1], logits.expand(1, 5)) == [3]


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 4000
    numbers = torch.tensor([number for _, number in zip(range(count), uniforms(0), strict=False)])
    for sampling in (Sampling(temperature=0.7), Sampling(temperature=0.7, top_k=4)):
        chosen = choose(logits.expand(count, 4), sampling, numbers)
        shares = torch.bincount(chosen, minlength=4) / count
        wanted = (logits / 0.7).softmax(-1)
        # Four standard deviations of a binomial share.
        assert ((shares - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt()).all()


def test_the_rarest_tokens_of_a_large_vocabulary_are_drawn():
    # Each of the last has a probability of 2e-9, below what float32 resolves near 1.
    logits = torch.zeros(1, 100_001)
    logits[0, 0] = math.log(5e8)
    assert choose(logits, Sampling(), torch.tensor([1 - 1e-9], dtype=torch.float64)).item() > 90_000


@settings(max_examples=50, deadline=None)
@given(
    LOGITS,
    st.builds(
        Sampling,
        top_k=st.none() | st.integers(1, 12),
        top_p=st.none() | st.floats(0.05, 1.0),
        min_p=st.none() | st.floats(0.0, 1.0),
    ),
    st.sampled_from([0.0, 0.3, 1 - 2**-53]),
)
def test_nothing_refused_is_drawn(logits, sampling, number):
    token = choose(logits, sampling, torch.tensor([number], dtype=torch.float64))
    assert probabilities(logits, sampling)[0, token] > 0


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 1.5, 1.4]])
    for number in (0.0, 0.5, 0.999):
        uniform = torch.tensor([number], dtype=torch.float64)
        for more in ({}, {"top_k": 2}, {"top_p": 0.9}):
            assert choose(logits, Sampling(temperature=1e-30, **more), uniform).item() == 1


def test_rows_do_not_see_each_other():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    numbers = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(), Sampling(top_k=7), Sampling(top_p=0.6), Sampling(min_p=0.2), Sampling(temperature=0)):
        whole = choose(logits, sampling, numbers)
        parts = [choose(logits[row : row + 1], sampling, numbers[row : row + 1]).item() for row in range(5)]
        assert whole.tolist() == parts


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=2), Sampling(top_p=0.5)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_reported(sampling, wrong):
    logits = torch.zeros(2, 9)
    logits[1, 3] = wrong
    with pytest.raises(NumericalError, match="not numbers"):
        choose(logits, sampling, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**arguments)
