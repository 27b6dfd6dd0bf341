"""Construction, initial values, tying, precision and limits of the decoder."""

from __future__ import annotations

import copy
import inspect
import itertools
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Loss, Model
from modalities_models.components import COMPONENTS
from modalities_models.decoder import Decoder, decoder
from modalities_models.head import TiedHead
from modalities_models.initialization import Initialization, Llama, Plain, Scaled
from modalities_models.losses import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_models.nn.rope import rotate, rotation
from modalities_models.nn.rope_scaling import Linear
from modalities_models.presets import PRESETS

TINY = {"vocab_size": 61, "sequence_length": 16, "hidden_size": 32, "layers": 2, "heads": 4}
VARIANTS = {
    "llama": {},
    "grouped": {"key_value_heads": 2, "query_key_norm": "head", "tied_embeddings": True},
    "gpt2": {"norm": "layer", "activation": "gelu", "positions": "absolute", "bias": True, "tied_embeddings": True},
    "no-positions": {"positions": "none", "head_size": 7},
    "sandwich": {"norm_placement": "sandwich", "activation": "geglu", "attention_windows": (5, None)},
    "post": {"norm_placement": "post", "query_key_norm": "projection", "vocab_multiple": 32, "logit_softcap": 9.0},
    "mixture": {
        "feedforward": MixtureOfExperts(
            experts=4, experts_per_token=2, intermediate_size=16, shared_intermediate_size=8, shared_gate=True
        )
    },
}


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("initialization", [Plain(), Scaled(0.05), Llama()])
def test_meta_construction_then_filling_equals_direct_construction(variant, initialization):
    arguments = TINY | VARIANTS[variant] | {"initialization": initialization, "seed": 5}
    direct = decoder(**arguments)
    with torch.device("meta"):
        late = decoder(**arguments)
    assert all(parameter.is_meta for parameter in late.parameters())
    late.to_empty(device="cpu")
    unfilled = {**dict(late.named_parameters()), **dict(late.named_buffers())}
    with torch.no_grad():
        for name, values in late.initial_values():
            assert values.dtype == torch.float32 and values.device.type == "cpu"
            unfilled.pop(name).copy_(values)
    assert not unfilled
    assert direct.state_dict().keys() == late.state_dict().keys()
    for name, values in direct.state_dict().items():
        assert torch.equal(values, late.state_dict()[name]), name
    assert torch.equal(direct(tokens()), late(tokens()))
    assert variant == "mixture" or not list(direct.buffers())


def test_initial_values_depend_on_seed_and_name_only():
    torch.manual_seed(0)
    first = dict(decoder(**TINY, seed=1).initial_values())
    torch.manual_seed(99)
    model = decoder(**TINY | {"layers": 5}, seed=1, initialization=Plain())
    backwards = dict(reversed(list(decoder(**TINY, seed=1, initialization=Plain()).initial_values())))
    for name, values in backwards.items():
        assert torch.equal(values, dict(model.initial_values())[name])
    other = dict(decoder(**TINY, seed=2).initial_values())
    query = "blocks.0.attention.query.weight"
    assert not torch.equal(first[query], other[query])
    assert not torch.equal(first[query], first[query.replace("query", "key")])
    assert not torch.equal(first[query], first[query.replace("0", "1")])


@pytest.mark.parametrize(
    ("initialization", "expected"),
    [
        (Plain(0.02), {"embedding": 0.02, "query": 0.02, "output.1": 0.02, "output.4": 0.02, "head": 0.02}),
        (Scaled(0.02), {"embedding": 0.02, "query": 0.02, "output.1": 0.02 / 8**0.5, "down.4": 0.02 / 8**0.5}),
        # 0.98658 is the standard deviation of a unit normal cut at 3.
        (
            Llama(0.02),
            {
                "embedding": 0.02 * 0.98658,
                "query": 0.02 * 0.98658,
                "output.1": 0.02 * 0.98658 / 2**0.5,
                "down.4": 0.02 * 0.98658 / 8**0.5,
                "head": 0.98658 / 256**0.5,
            },
        ),
    ],
)
def test_standard_deviations_follow_the_published_schemes(initialization, expected):
    arguments = {"vocab_size": 512, "sequence_length": 8, "hidden_size": 256, "layers": 4, "heads": 4}
    values = dict(decoder(**arguments, bias=True, norm="layer", initialization=initialization).initial_values())
    names = {
        "embedding": "embedding.weight",
        "query": "blocks.2.attention.query.weight",
        "output.1": "blocks.0.attention.output.weight",
        "output.4": "blocks.3.attention.output.weight",
        "down.4": "blocks.3.feedforward.down.weight",
        "head": "head.weight",
    }
    for key, std in expected.items():
        sample = values[names[key]]
        assert sample.std().item() == pytest.approx(std, rel=0.02), key
        assert abs(sample.mean().item()) < std / 20
    assert torch.equal(values["blocks.0.attention_norm.weight"], torch.ones(256))
    assert torch.equal(values["blocks.0.attention.query.bias"], torch.zeros(256))
    assert isinstance(initialization, Initialization)
    if isinstance(initialization, Llama):
        assert values["blocks.2.attention.query.weight"].abs().max() <= 0.06


def test_tied_head_follows_the_embedding():
    model = decoder(**TINY, tied_embeddings=True)
    assert isinstance(model.head, TiedHead) and not list(model.head.parameters())
    assert not any("head" in name for name in model.state_dict())
    hidden = model(tokens())
    assert torch.equal(model.head(hidden), hidden @ model.embedding.weight.T)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embedding.weight.mul_(2)
    assert torch.equal(twin.head(hidden), 2 * model.head(hidden))
    assert twin.double().head(hidden.double()).dtype == torch.float64
    model.embedding.weight = torch.nn.Parameter(torch.zeros_like(model.embedding.weight))
    assert not model.head(hidden).any()


def test_tied_embedding_gets_both_gradients():
    model = decoder(**TINY, tied_embeddings=True).double()
    hidden = model(tokens())
    model.head(hidden).square().sum().backward()
    both = model.embedding.weight.grad.clone()
    model.zero_grad()
    (model(tokens()) @ model.embedding.weight.detach().T).square().sum().backward()
    (model(tokens()).detach() @ model.embedding.weight.T).square().sum().backward()
    torch.testing.assert_close(model.embedding.weight.grad, both)


@pytest.mark.parametrize("positions", [[0, 1, 255, 256, 257, 4095, 8191]])
def test_rotation_is_float32_exact_under_bfloat16(positions):
    positions_T = torch.tensor(positions)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            turned = rotation(positions_T, 64, 500_000.0)
    finally:
        torch.set_default_dtype(torch.float32)
    frequencies = 500_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = positions_T.double()[:, None] * frequencies
    assert turned.cos_T1F.dtype == turned.sin_T1F.dtype == torch.float32
    # Half an ulp of a float32 angle of 8191 is 2.4e-4; bfloat16 would be off by whole turns.
    for got, wanted, sign in ((turned.cos_T1F, angles.cos(), 1), (turned.sin_T1F, angles.sin(), -1)):
        torch.testing.assert_close(got[:, 0, 32:].double(), wanted, rtol=0, atol=2e-3)
        assert torch.equal(got[..., :32], sign * got[..., 32:])


def test_rotation_is_complex_multiplication_and_keeps_relative_positions():
    torch.manual_seed(0)
    heads = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    turned = rotate(heads, rotation(torch.arange(6), 8, 100.0))
    angles = torch.outer(torch.arange(6.0, dtype=torch.float64), 100.0 ** (-torch.arange(4.0, dtype=torch.float64) / 4))
    wanted = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(torch.complex(turned[..., :4], turned[..., 4:]), wanted, rtol=0, atol=1e-6)
    same = heads[:, :1].expand(1, 6, 2, 8)
    turned = rotate(same, rotation(torch.arange(6), 8, 100.0))
    products = torch.einsum("bthf,bshf->bhts", turned, turned)
    torch.testing.assert_close(products[..., :-1, :-1], products[..., 1:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_no_token_sees_the_future(variant):
    model = decoder(**TINY | VARIANTS[variant])
    before = tokens()
    after = before.clone()
    after[:, 9] = (after[:, 9] + 1) % 61
    changed = (model(before) != model(after)).any(-1)
    assert not changed[:, :9].any() and changed[:, 9:].all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_and_autocast_stay_close_to_float32(variant):
    model = decoder(**TINY | VARIANTS[variant])
    exact = model(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens())
    rounded = model.bfloat16()(tokens())
    assert rounded.dtype == torch.bfloat16
    for got in (mixed, rounded):
        assert (got.float() - exact).norm() / exact.norm() < 0.03


def test_dropout_acts_in_training_only():
    plain = decoder(**TINY)
    dropping = decoder(**TINY, dropout=0.5)
    assert torch.equal(dropping.eval()(tokens()), plain(tokens()))
    dropping.train()
    assert not torch.equal(dropping(tokens()), dropping(tokens()))
    torch.manual_seed(4)
    first = dropping(tokens())
    torch.manual_seed(4)
    assert torch.equal(first, dropping(tokens()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_and_compiled_blocks_give_the_same(variant):
    torch.compiler.reset()
    model = decoder(**TINY | VARIANTS[variant]).double()
    model(tokens()).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for wrap in (recomputed, traced):
        model.zero_grad()
        twin = copy.deepcopy(model)
        for block in twin.blocks:
            wrap(block)
        twin(tokens()).square().sum().backward()
        for name, gradient in wanted.items():
            torch.testing.assert_close(twin.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-9, msg=name)


def recomputed(block):
    inner = block.forward
    block.forward = lambda *inputs: checkpoint(inner, *inputs, use_reentrant=False)


def traced(block):
    block.compile(fullgraph=True, backend="aot_eager")


def test_input_longer_than_the_model_is_refused():
    model = decoder(**TINY)
    with pytest.raises(ConfigError, match="at most 16 tokens, not 17") as caught:
        model(tokens(length=17))
    assert caught.value.about == (model, "sequence_length")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "lama-60m"}, "did you mean llama-60m"),
        ({}, "needs vocab_size, sequence_length, hidden_size, layers, heads"),
        (TINY | {"hidden_size": 30}, r"heads 4 does not divide hidden_size 30 \(remainder 2\)"),
        (TINY | {"key_value_heads": 3}, "key_value_heads 3 does not divide heads 4"),
        (TINY | {"head_size": 7}, "head_size must be even, not 7"),
        (TINY | {"layers": 0}, "layers must be positive"),
        (TINY | {"heads": -4}, "heads must be positive"),
        (TINY | {"norm_eps": 0.0}, "norm_eps must be positive"),
        (TINY | {"dropout": 1.0}, "dropout is a probability"),
        (TINY | {"norm": "batch"}, "must be one of rms, layer"),
        (TINY | {"norm_placement": "both"}, "must be one of pre, post, sandwich"),
        (TINY | {"activation": "relu"}, "must be one of swiglu, geglu, gelu, relu_squared"),
        (TINY | {"query_key_norm": True}, "query_key_norm is True; it must be one of none, head, projection"),
        (TINY | {"attention_windows": ()}, "needs at least one entry"),
        (TINY | {"attention_windows": (4, 0)}, "attention_windows must be positive, not 0"),
        (TINY | {"attention_softcap": 0.0}, "attention_softcap must be positive"),
        (TINY | {"logit_softcap": -1.0}, "logit_softcap must be positive"),
        (TINY | {"residual_multiplier": 0.0}, "residual_multiplier must be positive"),
        (TINY | {"vocab_multiple": 0}, "vocab_multiple must be positive"),
        (TINY | {"positions": "none", "rope_scaling": Linear(2.0)}, "positions is 'none'"),
    ],
)
def test_impossible_arguments_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        decoder(**arguments)


@pytest.mark.parametrize("std", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_standard_deviations_are_refused(std):
    for kind in (Plain, Scaled, Llama):
        with pytest.raises(ConfigError, match="std must be positive"):
            kind(std=std)


def test_overrides_win_and_derived_numbers_follow():
    model = decoder("nano", hidden_size=96, heads=6, activation="gelu", tied_embeddings=False)
    a = model.architecture
    assert (a.head_size, a.key_value_heads, a.intermediate_size) == (16, 6, 384)
    assert a.vocab_size == PRESETS["nano"]["vocab_size"] and not a.tied_embeddings


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_model(preset):
    with torch.device("meta"):
        model = decoder(preset)
        hidden = model(torch.zeros(1, 4, dtype=torch.long))
        assert model.head(hidden).shape == (1, 4, model.vocab_size)
    assert isinstance(model, Model)
    assert model.parallel_plan().blocks == ("blocks.*",)


def test_components_are_annotated_and_every_argument_is_described():
    assert all(isinstance(target, str) for target in COMPONENTS.values())
    for target in COMPONENTS.values():
        module, name = target.split(":")
        component = getattr(__import__(module, fromlist=[name]), name)
        is_class = inspect.isclass(component)
        hints = typing.get_type_hints(component.__init__ if is_class else component)
        arguments = list(inspect.signature(component).parameters)
        assert set(arguments) <= set(hints)
        documented = inspect.getdoc(component) or ""
        assert all(f"{argument}:" in documented for argument in arguments), target
    assert isinstance(CrossEntropy(), Loss)


def test_every_combination_builds_and_trains():
    options = {
        "norm": ("rms", "layer"),
        "norm_placement": ("pre", "post", "sandwich"),
        "activation": ("swiglu", "geglu", "gelu", "relu_squared"),
        "positions": ("rope", "absolute", "none"),
        "bias": (False, True),
        "query_key_norm": ("none", "head", "projection"),
        "tied_embeddings": (False, True),
        "feedforward": (None, MixtureOfExperts(experts=3, experts_per_token=2, intermediate_size=8)),
        "logit_softcap": (None, 5.0),
    }
    # Some of the 3456: 53 divides no number of choices, so each choice meets many of the others.
    for values in itertools.islice(itertools.product(*options.values()), 0, None, 53):
        model = decoder(**TINY, **dict(zip(options, values, strict=True)))
        assert isinstance(model, Decoder)
        model.head(model(tokens(1, 4))).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (values, name)


def test_readme_examples_run():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    done = subprocess.run([sys.executable, "-c", "\n".join(examples)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "parameters, " in done.stdout and "nats per token" in done.stdout
    assert "8030261248" in done.stdout and "57912852480.0" in done.stdout


def test_readme_names_every_component_and_preset():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name in (*COMPONENTS, *PRESETS):
        assert f"`{name}`" in readme, name
