"""Training from the weights of a Hugging Face checkpoint, and what is refused of such folders."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modalities_core.config.document import parse
from modalities_core.config.graph import Graph
from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import Model
from modalities_core.registry import Registry
from modalities_models.components import COMPONENTS
from modalities_models.decoder import Decoder, decoder
from modalities_models.huggingface.exporting import export, new_folder
from modalities_models.huggingface.pretrained import Pretrained, pretrained
from modalities_models.initialization import Scaled

SHAPE = {"vocab_size": 61, "sequence_length": 16, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 40}


@pytest.fixture(scope="module")
def original() -> Decoder:
    """A small decoder with windows, in the shape of a Mistral."""
    return decoder(**SHAPE, key_value_heads=1, attention_windows=(5,), seed=3)


@pytest.fixture
def folder(original: Decoder, tmp_path: Path) -> Path:
    """The decoder as a checkpoint of Hugging Face's."""
    with new_folder(tmp_path / "weights") as temporary:
        export(temporary, original.architecture, original.state_dict().__getitem__, token_ids={"eos_token_id": 2})
    return tmp_path / "weights"


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "gone"}))


def graph(text: str, folder: Path) -> Graph:
    registry = Registry()
    for name, target in COMPONENTS.items():
        registry.add(name, target)
    return Graph(parse(f"version: 1\n{text}", "c.yaml", folder), registry, {"model": Model})


CONFIG = """
model:
  component: model.decoder
  vocab_size: 61
  sequence_length: 12
  hidden_size: 32
  layers: 2
  heads: 2
  key_value_heads: 1
  intermediate_size: 40
  norm_eps: 1e-5
  attention_windows: [5]
  vocab_multiple: 8
  initialization: {component: initialization.pretrained, path: weights}
"""


def test_a_config_starts_from_the_weights(original: Decoder, folder: Path) -> None:
    built = graph(CONFIG, folder.parent)
    built.check()
    model = built.build("model")
    assert model.sequence_length == 12
    wanted = original.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value[: len(wanted[name])], wanted[name], rtol=0, atol=0)
    assert model.embedding.weight.shape == (64, 32) and not model.embedding.weight[61:].any()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(model.head(model(tokens)), original.head(original(tokens)))


def test_the_values_are_those_of_deferred_construction(original: Decoder, folder: Path) -> None:
    with torch.device("meta"):
        model = pretrained(folder)
    values = dict(model.initial_values())
    assert values.keys() == original.state_dict().keys() == dict(model.named_parameters()).keys()
    for name, value in original.state_dict().items():
        assert values[name].dtype == torch.float32 and values[name].device.type == "cpu"
        assert torch.equal(values[name], value), name


def test_bfloat16_weights_become_float32_parameters(original: Decoder, tmp_path: Path) -> None:
    with new_folder(tmp_path / "half") as temporary:
        export(temporary, original.architecture, original.state_dict().__getitem__, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model = pretrained(tmp_path / "half", sequence_length=10, dropout=0.1)
    assert model.sequence_length == 10 and model.architecture.dropout == 0.1
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "layers is 3, there 2"),
        ({"attention_windows": (4,)}, r"attention_windows is \(4,\), there \(5,\)"),
        ({"tied_embeddings": True, "rope_theta": 77.0}, "rope_theta is 77.0, there 10000.0; tied_embeddings is True"),
    ],
)
def test_another_decoder_is_refused_before_anything_is_read(original, folder, change, message) -> None:
    (folder / "model.safetensors").unlink()
    weights = Pretrained(folder)
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        Decoder(replace(original.architecture, **change), weights)


def test_a_mistake_names_its_config_path(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.initialization\.path.*heads is 1"):
        graph(CONFIG.replace("\n  heads: 2\n  key", "\n  heads: 1\n  head_size: 16\n  key"), folder.parent).build(
            "model"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "models of type `mamba` cannot be imported"),
        ({"model_type": "mistrall"}, "did you mean `mistral`"),
        ({"clip_qkv": 8.0}, "does not know for mistral: `clip_qkv: 8.0`"),
        ({"attention_bias": True}, "does not know for mistral: `attention_bias: true`"),
        ({"hidden_act": "relu"}, '`hidden_act: "relu"` cannot be imported'),
        ({"rope_parameters": "gone", "rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is none of"),
        ({"rope_parameters": "gone", "rope_scaling": {"type": "linear"}}, "rope type 'linear' needs 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only 0.5 of every head"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "warp": 1}}, "with warp is not known"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": "wide"}, "`hidden_size` is 'wide', which is no int"),
        ({"hidden_size": None}, "does not say `hidden_size`"),
        ({"num_attention_heads": 3}, r"config.json means \(48, 32\)"),
        ({"num_hidden_layers": 0}, "layers must be positive"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors that its config.json asks for"),
        ({"num_hidden_layers": 1}, "has 9 tensors that a MistralForCausalLM of its config.json has not"),
        ({"intermediate_size": 41}, r"the shape \(40, 32\), but config.json means \(41, 32\)"),
        ({"tie_word_embeddings": True}, "a head that differs from its embedding"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(folder: Path, changes, message) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        pretrained(folder)


def test_code_in_a_folder_is_ignored_and_named(folder: Path, caplog) -> None:
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('was run')")
    with caplog.at_level(logging.WARNING, "modalities"):
        pretrained(folder)
    assert "auto_map" in caplog.text


def test_pickles_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model.bin\)") as caught:
        pretrained(folder)
    assert "save_pretrained" in caught.value.hint


def test_damaged_and_missing_files_are_named(original: Decoder, folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        pretrained(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        pretrained(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="no safetensors beside it"):
        pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1.safetensors is missing"):
        pretrained(folder)
    with pytest.raises(CheckpointError, match="is not a Hugging Face checkpoint"):
        pretrained(tmp_path / "nowhere")


def test_names_of_a_headless_model_and_old_constants_are_understood(original: Decoder, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tied = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    tied["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tied, folder / "model.safetensors")
    edit(folder, tie_word_embeddings=True)
    model = pretrained(folder)
    assert torch.equal(model.blocks[1].attention.query.weight, original.blocks[1].attention.query.weight)


def test_an_equal_head_beside_a_tied_embedding_is_fine(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    edit(folder, tie_word_embeddings=True)
    assert pretrained(folder).architecture.tied_embeddings


def test_a_random_initialization_is_none_of_given_weights(original: Decoder) -> None:
    with torch.device("meta"):
        model = Decoder(original.architecture, Scaled(), seed=3)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.initial_values())
