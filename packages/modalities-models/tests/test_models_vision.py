"""The vision transformer against Hugging Face's, weights copied by name."""

from __future__ import annotations

import pytest
import torch

from modalities_core.errors import ConfigError
from modalities_models.nn.patches import PatchEmbedding, patches
from modalities_models.vision import VisionTransformer

NAMES = {
    "attention_norm": ("layernorm_before", "layernorm_before"),
    "attention.query": ("attention.q_proj", "attention.attention.query"),
    "attention.key": ("attention.k_proj", "attention.attention.key"),
    "attention.value": ("attention.v_proj", "attention.attention.value"),
    "attention.output": ("attention.o_proj", "attention.output.dense"),
    "feedforward_norm": ("layernorm_after", "layernorm_after"),
    "feedforward.up": ("mlp.fc1", "intermediate.dense"),
    "feedforward.down": ("mlp.fc2", "output.dense"),
}
"""Our name of a part of a block, and those that newer and older versions of transformers have."""


def theirs(activation="gelu", image_size=12, patch_size=4, channels=3, layers=2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=40, hidden_act=activation,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12, image_size=image_size,
        patch_size=patch_size, num_channels=channels, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


def copied(model, **arguments):
    """Ours with their weights."""
    config, state = model.config, model.state_dict()
    made = VisionTransformer(
        config.image_size, config.patch_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_channels, config.intermediate_size, norm_eps=config.layer_norm_eps, **arguments,
    )  # fmt: skip
    convolution = state["embeddings.patch_embeddings.projection.weight"]
    found = {
        "patch_embedding.projection.weight": convolution.flatten(1),
        "patch_embedding.projection.bias": state["embeddings.patch_embeddings.projection.bias"],
        "class_embedding": state["embeddings.cls_token"][0, 0],
        "position_embedding": state["embeddings.position_embeddings"][0],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    blocks, age = ("layers", 0) if "layers.0.attention.q_proj.weight" in state else ("encoder.layer", 1)
    for layer in range(config.num_hidden_layers):
        for our, their in NAMES.items():
            for kind in ("weight", "bias"):
                found[f"blocks.{layer}.{our}.{kind}"] = state[f"{blocks}.{layer}.{their[age]}.{kind}"]
    made.load_state_dict(found)
    return made


@pytest.mark.parametrize(("activation", "ours"), [("gelu", "gelu_exact"), ("gelu_pytorch_tanh", "gelu")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_hidden_states_and_gradients_are_those_of_transformers(activation, ours, dtype, tolerance):
    their = theirs(activation).to(dtype)
    our = copied(theirs(activation), activation=ours).to(dtype)
    images = torch.randn(3, 3, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = their(images).last_hidden_state
    hidden = our(images)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=tolerance)
    assert torch.equal(our.pooled(hidden), hidden[:, 0])
    expected.square().sum().backward()
    hidden.square().sum().backward()
    weight = their.get_parameter("embeddings.patch_embeddings.projection.weight").grad.flatten(1)
    scale = weight.abs().max()
    torch.testing.assert_close(
        our.patch_embedding.projection.weight.grad / scale, weight / scale, rtol=0, atol=10 * tolerance
    )


def test_one_channel_and_patches_of_another_size():
    their = theirs(image_size=6, patch_size=3, channels=1)
    images = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(copied(their)(images), their(images).last_hidden_state, rtol=0, atol=1e-5)


def test_patches_are_those_of_a_convolution():
    embedding = PatchEmbedding(3, 4, 8)
    images = torch.randn(2, 3, 8, 12)
    kernel = embedding.projection.weight.unflatten(1, (3, 4, 4))
    expected = torch.nn.functional.conv2d(images, kernel, embedding.projection.bias, stride=4)
    torch.testing.assert_close(embedding(images), expected.flatten(2).mT)
    assert patches(images, 4).shape == (2, 6, 48)


def test_bytes_become_minus_one_to_one():
    embedding = PatchEmbedding(1, 2, 3)
    pixels = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    expected = embedding(torch.tensor([[[[-1.0, 1.0], [-0.6, -0.2]]]]))
    torch.testing.assert_close(embedding(pixels), expected)


def test_mean_pooling_has_no_class_token():
    model = VisionTransformer((8, 4), 2, 16, 1, 2, channels=1, pooling="mean", activation="swiglu", norm="rms")
    hidden = model(torch.randint(0, 256, (3, 1, 8, 4), dtype=torch.uint8))
    assert hidden.shape == (3, 8, 16) and model.image_shape == (8, 4, 1) and model.tokens == 8
    torch.testing.assert_close(model.pooled(hidden), hidden.mean(1))
    assert "class_embedding" not in model.state_dict()


def test_patches_see_each_other_in_both_directions():
    model = VisionTransformer(8, 4, 16, 1, 2, pooling="mean", initialization=lambda v, r, g: v.normal_(generator=g))
    images = torch.randn(1, 3, 8, 8, requires_grad=True)
    model(images)[0, 0, 0].backward()
    assert (patches(images.grad, 4).abs().sum(-1) > 0).all()


def test_values_depend_on_name_and_seed_and_on_nothing_else():
    arguments = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "layers": 2, "heads": 2}
    with torch.device("meta"):
        hollow = VisionTransformer(**arguments, seed=3)
    assert all(value.is_meta for value in hollow.parameters())
    whole = dict(VisionTransformer(**arguments, seed=3).named_parameters())
    values = dict(hollow.initial_values())
    assert list(values) == list(whole)
    assert all(torch.equal(values[name], whole[name]) for name in whole)
    other = dict(VisionTransformer(**arguments, seed=4).named_parameters())
    assert not torch.equal(other["position_embedding"], whole["position_embedding"])
    # Projections into the residual stream start smaller by sqrt(2 * layers): 0.02 / 2.
    assert whole["blocks.0.feedforward.down.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert whole["blocks.0.feedforward.up.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_flops_and_parameters_of_the_base_model():
    with torch.device("meta"):
        model = VisionTransformer(224, 16, 768, 12, 12)
    # ViT-B/16 without its head: 768 * 768 + 768 for patches, 197 + 1 embeddings of 768, 12 blocks, the last norm.
    block = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 2 * 768
    assert sum(value.numel() for value in model.parameters()) == 590_592 + 198 * 768 + 12 * block + 1536 == 85_798_656
    matrices = 768 * 768 + 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert model.flops_per_image() == 197 * (6 * matrices + 12 * 12 * 768 * 197)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 9}, "does not divide the image size 9 x 9"),
        ({"image_size": (8, 6)}, "8 x 6"),
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"heads": 3}, "heads 3 does not divide hidden_size 16"),
        ({"pooling": "max"}, "class_token or mean"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        VisionTransformer(**{"image_size": 8, "patch_size": 4, "hidden_size": 16, "layers": 1, "heads": 2} | arguments)


def test_images_of_another_size_are_refused():
    model = VisionTransformer(8, 4, 16, 1, 2)
    with pytest.raises(ConfigError, match="3 x 8 x 12 .*takes 3 x 8 x 8"):
        model(torch.zeros(1, 3, 8, 12))
