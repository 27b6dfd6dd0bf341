"""What an export writes and holds in memory, and what family is chosen."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from modalities_core.errors import CheckpointError, ConfigError
from modalities_models.decoder import decoder
from modalities_models.huggingface.exporting import export, new_folder
from modalities_models.huggingface.families import family_named, family_of
from modalities_models.huggingface.files import Weights, write
from modalities_models.huggingface.loading import Checkpoint
from modalities_models.huggingface.tokenizer import byte_tokenizer, with_start
from modalities_models.huggingface.verifying import agreement, exported_decoder
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_models.presets import resolve

transformers = pytest.importorskip("transformers")

NANO = {"vocab_size": 61, "sequence_length": 16, "hidden_size": 32, "layers": 3, "heads": 2, "intermediate_size": 40}
PRESETS = {
    "gpt2": ("gpt2", 124_439_808),
    "llama3-8b": ("llama", 8_030_261_248),
    "qwen3-0.6b": ("qwen3", 596_049_920),
}


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """The source counts how many of the tensors it has given are still alive: those of one link, no more."""
    model = decoder(**NANO)
    state, alive, most = model.state_dict(), [], 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        alive[:] = [reference for reference in alive if reference() is not None]
        most = max(most, len(alive))
        tensor = state[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    export(tmp_path, model.architecture, read, stored=lambda name: torch.float32)
    assert most <= 1


def test_shards_and_their_index_are_what_transformers_reads(tmp_path: Path) -> None:
    model = decoder(**NANO)
    state = model.state_dict()
    export(tmp_path, model.architecture, state.__getitem__)
    whole = Weights(tmp_path)
    plan = [whole.info(name) for name in whole]
    (tmp_path / "sharded").mkdir()
    total = write(tmp_path / "sharded", plan, (whole.tensor(info.name) for info in plan), shard_bytes=20_000)
    (tmp_path / "sharded" / "config.json").write_text((tmp_path / "config.json").read_text())
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total == sum(value.numel() * 4 for value in state.values())
    assert all(path.stat().st_size < 21_500 for path in (tmp_path / "sharded").glob("*.safetensors"))
    for name, value in Checkpoint(tmp_path / "sharded").tensors():
        assert torch.equal(value, state[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").eval()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(theirs(tokens).logits, model.head(model(tokens)), rtol=1e-5, atol=1e-5)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_a_stock_class_of_the_published_size(name: str, tmp_path: Path) -> None:
    family, parameters = PRESETS[name]
    architecture = resolve(name, {})
    found = family_of(architecture)
    assert found.model_type == family
    values = {"model_type": family, "architectures": [found.class_name], **found.write(architecture)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"bias": True}, "llama"),
        ({"activation": "geglu"}, "llama"),
        ({"attention_windows": (4,)}, "mistral"),
        ({"attention_windows": (4, 4, 4)}, "mistral"),
        ({"attention_windows": (16,)}, "llama"),  # a window as long as the input is none
        ({"attention_windows": (4, None)}, "ministral"),
        ({"query_key_value_bias": True}, "qwen2"),
        ({"query_key_norm": "head"}, "qwen3"),
        ({"residual_multiplier": 0.5}, "granite"),
        ({"attention_scale": 0.3}, "granite"),
        ({"activation": "relu_squared"}, "arcee"),
        ({"norm": "layer", "bias": True, "activation": "gelu"}, "starcoder2"),
        ({"norm_placement": "post", "query_key_norm": "projection"}, "olmo2"),
        ({"norm_placement": "post", "query_key_norm": "projection", "attention_windows": (4, 4, None)}, "olmo3"),
        ({"logit_softcap": 3.0, "activation": "geglu", "embedding_multiplier": 32**0.5}, "vaultgemma"),
        (
            {
                "feedforward": MixtureOfExperts(
                    experts=4, experts_per_token=2, intermediate_size=8, score="sigmoid", shared_intermediate_size=16
                )
            },
            "glm4_moe",
        ),
        ({"dropout": 0.1, "attention": "sdpa", "vocab_multiple": 64}, "llama"),
    ],
)
def test_the_family_follows_from_the_numbers(changes, family) -> None:
    assert family_of(resolve(None, NANO | changes)).model_type == family


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_softcap": 3.0}, r"nearest is LlamaForCausalLM, which cannot have logit_softcap 3 \(it has None\)"),
        ({"positions": "none"}, r"cannot have positions none \(it has rope\)"),
        ({"norm": "layer"}, "norm layer"),
        (
            {"feedforward": MixtureOfExperts(experts=4, experts_per_token=2, intermediate_size=8)},
            r"MixtralForCausalLM, which cannot have feedforward.balance_rate 0.001 \(it has 0\)",
        ),
    ],
)
def test_what_no_stock_class_computes_is_refused_with_the_nearest(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of(resolve(None, NANO | changes))
    with pytest.raises(ConfigError):
        family_named("llama", resolve(None, NANO | changes))


def test_logits_that_differ_are_told_from_rounding() -> None:
    ours = torch.randn(1, 5, 7)
    assert agreement(ours, ours * (1 + 1e-6)).greedy == 5
    with pytest.raises(CheckpointError, match="differ from those of transformers by up to"):
        agreement(ours, ours.roll(1, -1))
    with pytest.raises(CheckpointError, match="differ"):
        agreement(ours * float("nan"), ours)
    with pytest.raises(CheckpointError, match="different shapes"):
        agreement(ours, ours[..., :6])


def test_a_type_too_narrow_for_the_weights_is_noticed(tmp_path: Path) -> None:
    model = decoder(**NANO)
    with torch.no_grad():
        model.embedding.weight[3, 3] = 1e5
    state = model.state_dict()
    export(tmp_path, model.architecture, state.__getitem__, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"embedding.weight comes back otherwise .* inf for 100000"):
        exported_decoder(tmp_path, model.architecture, state.__getitem__)


def test_a_tokenizer_writes_the_start_of_a_document_and_keeps_what_places_pieces() -> None:
    from tokenizers import Tokenizer

    plain = byte_tokenizer("<|end|>", 256)
    found = Tokenizer.from_str(with_start(plain, "<|end|>", 256))
    assert found.encode("hé").ids == [256, *"hé".encode()]
    assert found.encode("hé", add_special_tokens=False).ids == list("hé".encode())
    assert found.decode(found.encode("hé 🙂").ids) == "hé 🙂"
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    with_level = json.dumps(json.loads(plain) | {"post_processor": level})
    again = json.loads(with_start(with_start(with_level, "<|end|>", 256), "<|end|>", 256))["post_processor"]
    assert [step["type"] for step in again["processors"]] == ["ByteLevel", "TemplateProcessing"]
