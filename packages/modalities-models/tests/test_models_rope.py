"""Rotary angles and their scalings, to the bit as Hugging Face's."""

from __future__ import annotations

import math

import pytest
import torch

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture
from modalities_models.decoder import decoder
from modalities_models.nn.rope import rotate, rotation
from modalities_models.nn.rope_scaling import Linear, Llama3, Ntk, Yarn
from modalities_models.parts import RopeScaling

SCALINGS = {
    "linear": (Linear(2.5), {"rope_type": "linear", "factor": 2.5}),
    "ntk": (Ntk(64), {"rope_type": "dynamic", "factor": 1.0}),
    "ntk_growing": (Ntk(64, 3.0), {"rope_type": "dynamic", "factor": 3.0}),
    "yarn": (Yarn(4.0, 64), {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn_all": (
        Yarn(40.0, 512, attention_factor=1.3, beta_fast=20.0, beta_slow=2.0, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.3,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "llama3": (
        Llama3(8.0, 64),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "llama3_real": (
        Llama3(32.0, 8192, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
}
LENGTH = 256


def theirs(parameters: dict, head_size: int, theta: float):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The dynamic form counts from max_position_embeddings; the others take their original length from the parameters.
    longest = 64 if parameters["rope_type"] == "dynamic" else LENGTH
    config = transformers.LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=LENGTH)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_size", "theta"), [(8, 10_000.0), (64, 10_000.0), (128, 500_000.0), (96, 1e6)])
def test_scaled_frequencies_are_hugging_faces_to_the_bit(name, head_size, theta):
    scaling, parameters = SCALINGS[name]
    wanted, wanted_factor = theirs(parameters, head_size, theta)
    frequencies, factor = scaling.frequencies(head_size, theta, LENGTH)
    assert isinstance(scaling, RopeScaling)
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, wanted)
    assert factor == wanted_factor


@pytest.mark.parametrize("length", [1, 7, 64, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "yarn", "llama3"])
def test_cosines_and_sines_are_hugging_faces_to_the_bit(name, dtype, length):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaling, parameters = SCALINGS.get(name, (None, {"rope_type": "default"}))
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        rope_parameters=parameters | {"rope_theta": 10_000.0},
    )
    generator = torch.Generator().manual_seed(0)
    heads_BTHF = torch.randn(2, length, 2, 32, dtype=torch.float64, generator=generator).to(dtype)
    places = torch.arange(length)
    embedding = LlamaRotaryEmbedding(config).to(dtype if dtype != torch.bfloat16 else torch.float32)
    cos, sin = embedding(heads_BTHF, places[None])
    ours = rotation(places, 32, 10_000.0, scaling, LENGTH)
    assert torch.equal(ours.cos_T1F[:, 0].to(dtype), cos[0])
    assert torch.equal(ours.sin_T1F[:, 0, 16:].to(dtype), sin[0, :, 16:])
    wanted, _ = apply_rotary_pos_emb(heads_BTHF, heads_BTHF, cos, sin, unsqueeze_dim=2)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(rotate(heads_BTHF, ours), wanted, rtol=0, atol=tolerance)


def test_angles_are_float32_in_a_bfloat16_model():
    exact = torch.arange(4000, 4010).double()[:, None] * 10_000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    turned = rotation(torch.arange(4000, 4010), 32, 10_000.0)
    assert turned.cos_T1F.dtype == torch.float32
    # An angle of 4000 radians is rounded by up to 1.2e-4 in float32, by up to 8 in bfloat16.
    assert (turned.cos_T1F[:, 0, :16].double() - exact.cos()).abs().max() < 5e-4


def test_one_formula_for_the_static_form():
    """The static NTK form stretches the base by s^(F / (F - 2)) for s times the length."""
    frequencies, factor = Ntk(100).frequencies(16, 10_000.0, 400)
    wanted = (10_000.0 * 4 ** (16 / 14)) ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies, wanted)
    assert factor == 1.0
    assert torch.equal(Ntk(100, 2.0).frequencies(16, 10_000.0, 80)[0], Ntk(100).frequencies(16, 10_000.0, 100)[0])


def test_a_scaled_decoder_turns_by_scaled_angles():
    sizes = {"vocab_size": 50, "sequence_length": 64, "hidden_size": 32, "layers": 2, "heads": 2}
    tokens = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(0))
    plain, scaled = decoder(**sizes), decoder(**sizes, rope_scaling=Linear(4.0))
    assert not torch.allclose(plain(tokens), scaled(tokens), atol=1e-4)
    # Four times the position with a quarter of the frequency is the same angle.
    assert torch.equal(
        rotation(torch.tensor([8]), 16, 1e4, Linear(4.0)).cos_T1F, rotation(torch.tensor([2]), 16, 1e4).cos_T1F
    )
    caches = scaled.new_caches()
    pieces = [scaled(part, caches) for part in tokens.split([30, 9, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), scaled(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0.5), "factor must be at least 1"),
        (lambda: Ntk(0), "original_length must be positive"),
        (lambda: Ntk(10, 0.1), "factor must be at least 1"),
        (lambda: Ntk(10).frequencies(2, 1e4, 20), "head_size must be more than 2"),
        (lambda: Yarn(2.0, 10, attention_factor=-1.0), "attention_factor must be positive"),
        (lambda: Yarn(2.0, 10, beta_fast=0.5), "beta_fast must be at least beta_slow"),
        (lambda: Llama3(2.0, 10, 4.0, 4.0), "high_frequency_factor must be above"),
        (lambda: Llama3(math.nan, 10), "factor must be at least 1"),
    ],
)
def test_impossible_scalings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_scaling_needs_rotary_positions():
    numbers = {"vocab_size": 5, "sequence_length": 8, "hidden_size": 8, "layers": 1, "heads": 2, "key_value_heads": 2}
    with pytest.raises(ConfigError, match="rope_scaling stretches rotary positions"):
        Architecture(**numbers, head_size=4, intermediate_size=8, positions="absolute", rope_scaling=Linear(2.0))
