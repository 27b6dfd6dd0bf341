"""Settings as they lie on the hub, and whatever else may stand in a config.json."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import CheckpointError
from modalities_models.decoder import Decoder
from modalities_models.huggingface.loading import Checkpoint
from modalities_models.initialization import Scaled

transformers = pytest.importorskip("transformers")

# Settings in the form that older versions of transformers left on the hub.
HUB = {
    "llama": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}},
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "qwen2": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
            "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
            "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        494_032_768,
    ),
    "mixtral": (
        {
            "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
            "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True, "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "gemma2": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
            "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
            "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "torch_dtype": "float32", "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
        },
        2_614_341_888,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_settings_as_they_lie_on_the_hub_are_read(name: str, tmp_path: Path) -> None:
    values, parameters = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = Checkpoint(tmp_path)
    assert found.family.model_type == name
    with torch.device("meta"):
        assert Decoder(found.architecture, Scaled()).parameter_count == parameters
    # Written and read again, in the words of old and of new versions, it is the same decoder.
    again = found.family.write(found.architecture)
    for removed in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        text = json.dumps({"model_type": name, **{key: again[key] for key in again if key not in removed}})
        (tmp_path / "config.json").write_text(text)
        assert not Checkpoint(tmp_path).differences(found.architecture)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(HUB)), place=st.integers(0, 40), value=JSON)
def test_any_value_in_the_place_of_a_setting_is_read_or_refused(tmp_path_factory, name, place, value) -> None:
    values = dict(HUB[name][0])
    values[sorted(values)[place % len(values)]] = value
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(values))
    with contextlib.suppress(CheckpointError):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "more",
    [{}, {"attention_factor": 1.3}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"beta_fast": 16, "truncate": False}],
)
def test_yarn_turns_and_scales_as_in_transformers(more, tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **more}
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 5e3, **scaling},
    )
    config.save_pretrained(tmp_path)
    found = Checkpoint(tmp_path).architecture
    frequencies, factor = found.rope_scaling.frequencies(found.head_size, found.rope_theta, found.sequence_length)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert torch.equal(frequencies, wanted) and factor == pytest.approx(wanted_factor, rel=1e-12)
