"""A budget of memory: measured blocks, the fewest that are recomputed, and nothing changed in what is computed."""

from __future__ import annotations

import functools

import pytest
import torch
from parallel_small_model import SmallModel, batch
from test_parallel_recomputation import CPU, KINDS, WithDropout, assert_same, built, trained

from modalities_core.errors import ConfigError
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.recomputation_budget import Kept, budget, chosen, measured
from modalities_parallel.recomputed import recompute


def wide():
    return SmallModel(hidden=16, layers=6)


def again(model):
    return [block.recomputing for block in model.blocks]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1.0, [0, 0, 0, 0]), (0.9, [1, 0, 0, 0]), (0.55, [1, 1, 0, 0]), (0.35, [1, 1, 1, 0]), (0.0, [1, 1, 1, 1])],
)
def test_the_first_blocks_are_recomputed_as_many_as_needed(share, expected):
    assert chosen([Kept(100, 10)] * 4, share) == [bool(value) for value in expected]


def test_a_large_block_counts_as_it_is_and_one_that_gains_nothing_is_left():
    assert chosen([Kept(20, 20), Kept(300, 10), Kept(100, 10)], 0.4) == [False, True, False]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 6), (0.5, 4), (0.9, 1), (1.0, 0)])
def test_what_is_kept_is_within_the_budget(share, expected):
    model = built(wide, functools.partial(budget, share=share))
    trained(model)
    assert again(model) == [place < expected for place in range(6)]

    def bytes_for_backward(model):
        sizes = {}
        weights = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}

        def note(value):
            if (pointer := value.untyped_storage().data_ptr()) not in weights:
                sizes[pointer] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            hidden = torch.zeros(6, 9, 16, requires_grad=True) * 1.0
            for block in model.blocks:
                hidden = block(hidden)
            return sum(sizes.values())

    model.zero_grad(set_to_none=True)
    found, most = bytes_for_backward(model), bytes_for_backward(built(wide).train())
    inputs = 6 * 6 * 9 * 16 * 4
    assert found <= max(share * most, inputs) * 1.15


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_gradients_random_numbers_and_buffers_are_those_without(precision):
    model = built(WithDropout, functools.partial(budget, share=0.5))
    found, expected = trained(model, precision), trained(built(WithDropout), precision)
    assert_same(found, expected)
    assert again(model) == [True, True, False]
    assert not model.blocks[0]._forward_pre_hooks


def test_measuring_leaves_no_trace_and_counts_no_weights():
    model = built(WithDropout)
    block = model.blocks[0]
    recompute(block)
    hidden = torch.randn(2, 9, 14, requires_grad=True)
    torch.manual_seed(3)
    kept = measured(block.train(), (hidden,), {})
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert block.seen == 0 and block.recomputing
    assert kept.recomputed == 2 * 9 * 14 * 4
    # At least the input, query, key, value, what attention gives, and what the last product and ReLU take.
    assert 5 * kept.recomputed < kept.whole < 16 * kept.recomputed


def test_evaluation_does_not_measure():
    model = built(around=functools.partial(budget, share=1.0)).eval()
    with torch.no_grad():
        model(batch(0, 0, 2).tokens_BT)
    assert again(model) == [True, True, True] and model.blocks[0]._forward_pre_hooks


def test_it_nests_with_fsdp2():
    model = fsdp2(lambda: budget(SmallModel(), 0.5), CPU)
    assert_same(trained(model), trained(fsdp2(SmallModel, CPU)))
    assert again(model) == [True, True, False]


@pytest.mark.slow
def test_sharded_over_two_ranks(on_ranks):
    found, expected = (on_ranks(2, "execute", recomputed=kind) for kind in ("budget", "none"))
    assert found == expected


def test_impossible_shares_and_a_second_component_are_refused():
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        budget(built(), 1.5)
    with pytest.raises(ConfigError, match="already"):
        budget(built(around=KINDS["whole"]), 0.5)
