"""Models of transformers wrapped as ours: hidden states and head against the class's own forward, and refusals."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import Batch, Model
from modalities_models.decoder import Decoder
from modalities_models.head import Head
from modalities_models.huggingface.families import read_architecture
from modalities_models.huggingface.settings import Settings
from modalities_models.huggingface.wrapped import KEEPS_DOCUMENTS, HuggingFaceModel, huggingface
from modalities_models.initialization import Scaled
from modalities_models.losses import CrossEntropy
from modalities_models.losses.projection import projection

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 24,
    "sliding_window": 5,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.3, "embedding_multiplier": 3.0},
    "mistral": {"num_key_value_heads": 4},
    "gpt2": {"layer_norm_epsilon": 1e-3},
}
LOGITS = [
    "llama",
    "gpt2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "phi3",
    "mixtral",
    "phi",
    "granite",
    "cohere",
    "falcon",
    "mpt",
]
LOGITS += ["olmo2", "bloom", "nanochat", "opt"]


def small(model_type: str, **changes: Any) -> dict[str, Any]:
    """The numbers that a config of this type takes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    known = {*cls().to_dict(), *cls.attribute_map, *inspect.signature(cls).parameters}
    values = {key: value for key, value in SIZES.items() if key in known}
    return {**values, **OWN.get(model_type, {}), **changes}


def wrapped(model_type: str, **changes) -> HuggingFaceModel:
    longest = None if model_type not in ("mpt", "bloom") else 24
    return huggingface(model_type=model_type, config=small(model_type, **changes), sequence_length=longest, seed=1)


def class_with_weights_of(model: HuggingFaceModel):
    """What transformers itself builds for the config, with the same weights."""
    other = transformers.AutoModelForCausalLM.from_config(model.description.config, dtype=torch.float32)
    tensors = {name.removeprefix("network."): value for name, value in model.state_dict().items()}
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert set(missing) <= set(other.all_tied_weights_keys) and not unexpected
    return other.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(83, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", LOGITS)
def test_logits_and_gradients_are_those_of_the_class(model_type: str) -> None:
    model = wrapped(model_type).eval()
    assert isinstance(model, Model) and model.vocab_size == 83
    theirs = class_with_weights_of(model)
    tokens_BT = tokens(3, 13)
    hidden_BTD = model(tokens_BT)
    logits_BTV = model.head(hidden_BTD)
    wanted_BTV = theirs(tokens_BT).logits
    torch.testing.assert_close(logits_BTV, wanted_BTV, rtol=0, atol=1e-6 * wanted_BTV.abs().max().item())
    assert logits_BTV.std() > 1e-3
    # The loss takes the head in pieces where it knows it, and calls it in pieces where it does not.
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
    CrossEntropy(chunk_tokens=5)(model(batch.tokens_BT), model.head, batch).loss.backward()
    torch.nn.functional.cross_entropy(
        theirs(batch.tokens_BT).logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum"
    ).backward()
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in model.named_parameters():
        wanted = gradients[name.removeprefix("network.")]
        if wanted is not None:
            bound = 1e-5 * max(wanted.norm().item(), 1e-2)
            assert (value.grad - wanted).norm() <= bound, name


@pytest.mark.parametrize(
    ("model_type", "multiplier", "softcap"),
    [("llama", 1.0, None), ("gemma2", 1.0, 2.0), ("granite", 0.125, None), ("cohere", 0.0625, None)],
)
def test_a_plain_head_may_be_computed_in_pieces(model_type: str, multiplier: float, softcap: float | None) -> None:
    head = wrapped(model_type).head
    assert isinstance(head, Head) and projection(head, torch.empty(1, 32)) is not None
    assert (head.multiplier, head.softcap) == (multiplier, softcap)


def test_a_head_with_a_bias_is_called() -> None:
    model = wrapped("phi")
    assert not isinstance(model.head, Head) and projection(model.head, torch.empty(1, 32)) is None
    with torch.no_grad():
        model.network.lm_head.bias.add_(torch.arange(83.0))
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(model.head(hidden), model.network.lm_head(hidden))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mpt"])
def test_a_tied_head_is_one_parameter(model_type: str) -> None:
    model = wrapped(model_type)
    assert not [name for name in model.state_dict() if "lm_head" in name]
    names = list(dict(model.named_parameters(remove_duplicate=False)))
    assert len(names) == len(dict(model.named_parameters()))
    model.network.get_input_embeddings().weight.data.zero_()
    assert not model.head(torch.randn(2, 32)).any()


def test_dropout_is_off_in_evaluation_only() -> None:
    model = wrapped("gpt2", resid_pdrop=0.5)
    assert not torch.equal(model.train()(tokens(2, 8)), model(tokens(2, 8)))
    assert torch.equal(model.eval()(tokens(2, 8)), model(tokens(2, 8)))


@pytest.mark.parametrize("model_type", sorted(KEEPS_DOCUMENTS))
def test_documents_do_not_see_each_other(model_type: str) -> None:
    torch.manual_seed(0)
    model = wrapped(model_type).eval()
    packed, first, second = tokens(2, 20), slice(0, 8), slice(8, 20)
    segments = (torch.arange(20) >= 8).int().expand(2, 20)
    with torch.no_grad():
        together = model(packed, segments_BT=segments)
        for part in (first, second):
            torch.testing.assert_close(together[:, part], model(packed[:, part]), rtol=1e-4, atol=1e-5)
        assert (together[:, second] - model(packed)[:, second]).abs().max() > 1e-3


def test_classes_that_do_not_keep_documents_apart_refuse_them() -> None:
    with pytest.raises(ConfigError, match="MptForCausalLM is not known to keep them apart"):
        wrapped("mpt")(tokens(1, 8), segments_BT=torch.zeros(1, 8, dtype=torch.int32))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma2", "mixtral", "phi3", "qwen3_moe", "olmo2"])
def test_flops_are_those_of_our_decoder(model_type: str) -> None:
    model = wrapped(model_type)
    settings = Settings({**model.description.config.to_dict(), "model_type": model_type}, model_type)
    _, architecture = read_architecture(settings)
    with torch.device("meta"):
        ours = Decoder(architecture, Scaled())
    for length in (4, 24):
        assert model.flops_per_token(length) == pytest.approx(ours.flops_per_token(length))
        assert model.causal_flops_per_token(length) == pytest.approx(ours.causal_flops_per_token(length))


def test_flops_of_latent_attention_and_experts_by_hand() -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
    sizes = {key: value for key, value in small("deepseek_v3").items() if key != "head_dim"}
    model = huggingface(model_type="deepseek_v3", config=sizes | latent | experts | {"num_key_value_heads": 4})
    attention = 32 * 16 + 16 * 4 * 16 + 32 * (8 + 8) + 8 * 4 * (8 + 8) + 4 * 8 * 32
    dense, expert, router, head = 3 * 32 * 48, 3 * 32 * 24, 4 * 32, 83 * 32
    matmul = 2 * attention + dense + (2 + 1) * expert + router + head
    assert model.flops_per_token(20) == 6 * matmul + 2 * 6 * 4 * (16 + 8) * 20
    assert model.causal_flops_per_token(20) == 6 * matmul + 2 * 6 * 4 * (16 + 8) * 10
    other = class_with_weights_of(model.eval())
    torch.testing.assert_close(model.head(model(tokens(2, 9))), other(tokens(2, 9)).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "blocks"),
    [
        ("llama", "network.model.layers.*"),
        ("gpt2", "network.transformer.h.*"),
        ("gpt_neox", "network.gpt_neox.layers.*"),
        ("opt", "network.model.decoder.layers.*"),
    ],
)
def test_the_plan_names_the_blocks(model_type: str, blocks: str) -> None:
    model = wrapped(model_type)
    assert model.parallel_plan().blocks == (blocks,)
    assert all(type(block).__name__ in model.network._no_split_modules for block in list_of_blocks(model))


def list_of_blocks(model: HuggingFaceModel) -> list[torch.nn.Module]:
    place = model.parallel_plan().blocks[0].removesuffix(".*")
    return list(model.get_submodule(place).children())


def test_every_model_type_that_keeps_documents_reads_from_left_to_right() -> None:
    for model_type in sorted(KEEPS_DOCUMENTS):
        model = wrapped(model_type).eval()
        changed = tokens(1, 12)
        changed[:, 7:] = 1
        with torch.no_grad():
            before, after = model(tokens(1, 12))[:, :7], model(changed)[:, :7]
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5, msg=model_type)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either `path`"),
        ({"model_type": "lama"}, "no models of type `lama`; did you mean `llama`"),
        ({"model_type": "vit"}, "no causal language model of type `vit`"),
        ({"model_type": "gemma3"}, "several parts"),
        ({"model_type": "bert"}, "tokens see what comes after them"),
        ({"model_type": "xlnet", "sequence_length": 8}, "tokens see what comes after them"),
        ({"model_type": "llama", "config": {"hiden_size": 8}}, "`hiden_size`.*did you mean `hidden_size`"),
        ({"model_type": "llama", "config": {"hidden_size": "wide"}}, "refuses this config of llama"),
        ({"model_type": "llama", "weights": "pretrained"}, "pretrained weights need `path`"),
        ({"model_type": "llama", "sequence_length": 10**9}, "allows 1 to"),
        ({"model_type": "mamba", "config": {"num_hidden_layers": 1}}, "does not say how long"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        huggingface(**arguments)


def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ConfigError, match=r"needs transformers 5, this is 4\.57\.1\n.*pip install 'transformers>=5,<6"):
        wrapped("llama")


def test_a_name_on_the_hub_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="not a Hugging Face checkpoint.*\n.*hf download NAME --local-dir"):
        huggingface(path=Path("Qwen/Qwen3-0.6B"))


def test_the_implementation_of_attention_can_be_chosen() -> None:
    plain = wrapped("llama")
    eager = huggingface(model_type="llama", config=small("llama"), attention="eager", seed=1)
    assert plain.network.config._attn_implementation == "sdpa"
    assert eager.network.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(tokens(2, 9)), plain(tokens(2, 9)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM refuses its config"):
        huggingface(model_type="gemma2", config=small("gemma2"), attention="sdpa")


def test_longer_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="longer than sequence_length 24"):
        wrapped("llama")(tokens(1, 25))


def test_the_module_needs_no_transformers_to_be_imported() -> None:
    source = inspect.getsource(inspect.getmodule(huggingface))
    assert "\nimport transformers" not in source and "\nfrom transformers" not in source
