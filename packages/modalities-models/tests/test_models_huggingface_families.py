"""Every family against transformers' own classes: random settings, random weights, both directions, and gradients.

transformers upcasts to float32 in norms, routers and softmax whatever the precision of the model, so its float64 models
are good to 1e-7 only. ``InFull`` runs the same code without these casts. Two things stay in float32 there and are so in
ours as well: the angles of rotary positions (computed without gradients, where ``InFull`` does not look), and Gemma's
sqrt(hidden size), which is why hidden sizes are squares here.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modalities_models.decoder import Decoder
from modalities_models.huggingface.exporting import export
from modalities_models.huggingface.families import FAMILIES, family_of
from modalities_models.huggingface.family import shapes_of
from modalities_models.huggingface.loading import Checkpoint
from modalities_models.initialization import Scaled

transformers = pytest.importorskip("transformers")

LENGTH = 24
SEEDS = (0, 1)


class InFull(TorchFunctionMode):
    """Leaves float64 activations in float64 where a model asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if wide and torch.is_grad_enabled():
            if func is torch.Tensor.float or (
                func in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in args[1:]
            ):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def common(rng: random.Random) -> dict:
    heads = rng.choice([2, 4])
    return {
        "vocab_size": rng.randint(60, 110),
        "hidden_size": 64,
        "intermediate_size": rng.choice([48, 80]),
        "num_hidden_layers": rng.randint(2, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": None,  # transformers gives the row of padding no gradient
    }


def rope(rng: random.Random) -> dict:
    theta = rng.choice([500.0, 10_000.0, 1e6])
    kinds = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ]
    return {"rope_parameters": {"rope_theta": theta, **rng.choice(kinds)}}


def layer_types(rng: random.Random, layers: int) -> list[str]:
    return ["sliding_attention", *rng.choices(["sliding_attention", "full_attention"], k=layers - 1)]


def eps(rng: random.Random) -> dict:
    return {"rms_norm_eps": rng.choice([1e-6, 1e-5])}


def llama(rng):
    bias = rng.random() < 0.5
    more = {"attention_bias": bias, "mlp_bias": bias, "hidden_act": rng.choice(["silu", "gelu_pytorch_tanh"])}
    return transformers.LlamaConfig(**common(rng), **rope(rng), **eps(rng), **more, head_dim=rng.choice([16, None]))


def gpt2(rng):
    return transformers.GPT2Config(
        vocab_size=rng.randint(60, 110),
        n_positions=LENGTH,
        n_embd=64,
        n_layer=rng.randint(2, 4),
        n_head=rng.choice([2, 4]),
        n_inner=rng.choice([None, 72]),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=rng.random() < 0.7,
    )


def mistral(rng):
    return transformers.MistralConfig(**common(rng), **rope(rng), **eps(rng), sliding_window=rng.choice([None, 5, 9]))


def ministral(rng):
    values = common(rng)
    types = layer_types(rng, values["num_hidden_layers"])
    more = {"sliding_window": 6, "layer_types": types, "head_dim": 16}
    return transformers.MinistralConfig(**values, **rope(rng), **eps(rng), **more)


def qwen(config, rng, **more):
    window = rng.choice([None, 7])
    windows = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 1}
    return config(**common(rng), **rope(rng), **eps(rng), **windows, **more)


def qwen2(rng):
    return qwen(transformers.Qwen2Config, rng)


def qwen3(rng):
    return qwen(transformers.Qwen3Config, rng, head_dim=rng.choice([16, 24]))


def seed_oss(rng):
    biases = {"attention_bias": rng.random() < 0.7, "attention_out_bias": False, "mlp_bias": False}
    more = {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0}
    return transformers.SeedOssConfig(**common(rng), **rope(rng), **eps(rng), **biases, **more)


def granite(rng):
    factors = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 8.0,
    }
    return transformers.GraniteConfig(**common(rng), **rope(rng), **eps(rng), **factors)


def arcee(rng):
    return transformers.ArceeConfig(**common(rng), **rope(rng), **eps(rng))


def phi3(rng):
    values = {**common(rng), "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}}
    return transformers.Phi3Config(**values, **eps(rng), sliding_window=rng.choice([None, 8]))


def olmo2(rng):
    return transformers.Olmo2Config(**common(rng), **rope(rng), **eps(rng))


def olmo3(rng):
    values = common(rng)
    one = {"rope_type": "default", "rope_theta": 900.0}
    return transformers.Olmo3Config(
        **values,
        **eps(rng),
        sliding_window=6,
        layer_types=layer_types(rng, values["num_hidden_layers"]),
        rope_parameters={"full_attention": one, "sliding_attention": one},
    )


def gemma(rng):
    return transformers.GemmaConfig(**common(rng), **rope(rng), **eps(rng), head_dim=rng.choice([16, 32]))


def capped(config, rng):
    return config(
        **common(rng),
        **rope(rng),
        **eps(rng),
        head_dim=rng.choice([16, 32]),
        query_pre_attn_scalar=rng.choice([16, 40]),
        sliding_window=7,
        attn_logit_softcapping=rng.choice([None, 3.0]),
        final_logit_softcapping=rng.choice([None, 4.0]),
    )


def gemma2(rng):
    return capped(transformers.Gemma2Config, rng)


def vaultgemma(rng):
    return capped(transformers.VaultGemmaConfig, rng)


def starcoder2(rng):
    window = rng.choice([None, 6])
    return transformers.Starcoder2Config(**common(rng), **rope(rng), sliding_window=window)


def experts(rng: random.Random) -> dict:
    per_token = rng.choice([1, 2, 3])
    return {"num_experts": 5, "num_experts_per_tok": per_token, "norm_topk_prob": rng.random() < 0.5}


def mixtral(rng):
    more = {"num_local_experts": 4, "num_experts_per_tok": rng.choice([1, 2]), "sliding_window": rng.choice([None, 6])}
    return transformers.MixtralConfig(**common(rng), **rope(rng), **eps(rng), **more)


def qwen2_moe(rng):
    more = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "qkv_bias": rng.random() < 0.5}
    return transformers.Qwen2MoeConfig(**common(rng), **rope(rng), **eps(rng), **experts(rng), **more)


def qwen3_moe(rng):
    more = {"moe_intermediate_size": 24, "mlp_only_layers": rng.choice([[], [0], [1]]), "head_dim": 16}
    return transformers.Qwen3MoeConfig(**common(rng), **rope(rng), **eps(rng), **experts(rng), **more)


def olmoe(rng):
    return transformers.OlmoeConfig(**common(rng), **rope(rng), **eps(rng), **experts(rng))


def balanced(rng: random.Random) -> dict:
    return {
        "n_routed_experts": 6,
        "n_shared_experts": rng.choice([1, 2]),
        "moe_intermediate_size": 24,
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "norm_topk_prob": rng.random() < 0.5,
        "first_k_dense_replace": rng.choice([0, 1]),
    }


def dots1(rng):
    return transformers.Dots1Config(**common(rng), **rope(rng), **eps(rng), **balanced(rng), sliding_window=None)


def glm4_moe(rng):
    more = {"use_qk_norm": rng.random() < 0.5, "attention_bias": rng.random() < 0.5, "partial_rotary_factor": 1.0}
    return transformers.Glm4MoeConfig(**common(rng), **rope(rng), **eps(rng), **balanced(rng), **more)


CONFIGS = {
    family.__name__: family
    for family in (
        llama, gpt2, mistral, ministral, qwen2, qwen3, seed_oss, granite, arcee, phi3, olmo2, olmo3, gemma, gemma2,
        vaultgemma, starcoder2, mixtral, qwen2_moe, qwen3_moe, olmoe, dots1, glm4_moe,
    )
}  # fmt: skip


def make_theirs(config, dtype: torch.dtype) -> nn.Module:
    """A model of transformers whose weights are random everywhere, norms and biases included."""
    # Soft caps and the casts that InFull removes are in the eager path.
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).to(dtype)
    randomise(model)
    return model.train()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for tensor in model.parameters():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    for name, tensor in model.named_buffers():
        if name.endswith(("balance", "e_score_correction_bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def make_ours(architecture, tensors, dtype: torch.dtype) -> Decoder:
    model = Decoder(architecture, Scaled()).to(dtype)
    tensors = dict(tensors)
    assert tensors.keys() == model.state_dict().keys()
    model.load_state_dict(tensors)
    return model.train()


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Decoder):
        return model.head(model(tokens))
    with InFull():
        return model(tokens, use_cache=False).logits


def gradients(theirs: nn.Module, folder) -> dict[str, torch.Tensor]:
    """Gradients of a model of transformers under our names: stored as if they were weights, then translated."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    theirs.save_pretrained(folder)
    found = Checkpoint(folder)
    values = dict(found.tensors())
    zeros = {}
    for link in found.family.links(found.architecture, shapes_of(found.architecture)):
        ours = [torch.zeros_like(values[name]) for name in link.ours]
        zeros |= zip(link.ours, link.to_ours([torch.zeros_like(it) for it in link.to_theirs(ours)]), strict=True)
    # Links are affine: what they add to zero is no part of a gradient.
    return {name: value - zeros[name] for name, value in values.items()}


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_import_gives_the_same_logits_and_gradients(name, seed, dtype, tolerance, tmp_path) -> None:
    theirs = make_theirs(CONFIGS[name](random.Random(seed)), dtype)
    theirs.save_pretrained(tmp_path / "weights")
    found = Checkpoint(tmp_path / "weights")
    assert found.family.model_type == name
    ours = make_ours(found.architecture, found.tensors(), dtype)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    tokens = torch.randint(found.architecture.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    their_logits, our_logits = logits(theirs, tokens), logits(ours, tokens)
    torch.testing.assert_close(our_logits, their_logits, rtol=tolerance, atol=tolerance)

    direction = torch.randn(our_logits.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for values in (their_logits, our_logits):
        (values * direction / direction.numel() ** 0.5).sum().backward()
    wanted = gradients(theirs, tmp_path / "gradients")
    for parameter_name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
        torch.testing.assert_close(
            parameter.grad, wanted[parameter_name], rtol=10 * tolerance, atol=10 * tolerance, msg=parameter_name
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_export_gives_the_same_logits(name, seed, dtype, tolerance, tmp_path) -> None:
    CONFIGS[name](random.Random(seed)).save_pretrained(tmp_path)
    architecture = Checkpoint(tmp_path).architecture
    ours = Decoder(architecture, Scaled(), seed=5).to(dtype)
    randomise(ours)
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", architecture, ours.state_dict().__getitem__, family=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    assert theirs.config.model_type == name
    tokens = torch.randint(architecture.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), rtol=tolerance, atol=tolerance)
    # What was written is read back as what it was, to the last bit.
    back = dict(Checkpoint(tmp_path / "out").tensors())
    exact = not name.startswith(("gemma", "vault"))  # theirs keep norm scales as distance from one
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_family_is_found_from_the_architecture_alone(name, seed, tmp_path) -> None:
    CONFIGS[name](random.Random(seed)).save_pretrained(tmp_path)
    architecture = Checkpoint(tmp_path).architecture
    found = family_of(architecture)
    # A family without what sets it apart may be expressed by an earlier one.
    assert not found.differences(architecture)
