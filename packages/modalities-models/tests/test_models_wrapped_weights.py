"""Wrapped models of transformers: random initial values, weights of folders, and exports."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modalities_core.errors import CheckpointError, ConfigError
from modalities_models.huggingface.construction import Construction
from modalities_models.huggingface.files import Weights
from modalities_models.huggingface.wrapped import HuggingFaceModel, huggingface

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
WIDE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "gpt2": SIZES,
    "gemma2": WIDE | {"head_dim": 8},
    "mixtral": WIDE | {"num_local_experts": 4},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "mamba": {"vocab_size": 83, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0},
}
TOKENS = torch.randint(83, (3, 11), generator=torch.Generator().manual_seed(0))


def random(model_type: str, seed: int = 3) -> HuggingFaceModel:
    return huggingface(model_type=model_type, config=CONFIGS[model_type], sequence_length=24, seed=seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as transformers writes them, with weights larger than at the start."""
    made = {}
    for model_type, values in CONFIGS.items():
        torch.manual_seed(5)
        config = transformers.AutoConfig.for_model(model_type, **values)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        made[model_type] = tmp_path_factory.mktemp(model_type) / "weights"
        model.save_pretrained(made[model_type])
    return made


def logits_of_transformers(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@torch.no_grad()
def logits(model: HuggingFaceModel) -> torch.Tensor:
    model.eval()
    return model.head(model(TOKENS))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_random_values_follow_the_class(model_type: str) -> None:
    with torch.device("meta"):
        model = random(model_type)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(model.description.config, dtype=torch.float32)
    ours = {name.removeprefix("network."): value for name, value in model.initial_values()}
    wanted = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    assert ours.keys() == wanted.keys()
    drawn = 0
    for name, value in wanted.items():
        assert ours[name].shape == value.shape and ours[name].device.type == "cpu", name
        if name in dict(theirs.named_buffers()) or value.unique().numel() == 1:
            assert torch.equal(ours[name], value), name
        elif value.numel() > 500:
            assert ours[name].std().item() == pytest.approx(value.std().item(), rel=0.15), name
            drawn += not torch.equal(ours[name], value)
    assert drawn >= 4


@pytest.mark.parametrize("model_type", CONFIGS)
def test_values_are_the_same_however_a_model_is_built(model_type: str) -> None:
    built = {**dict(random(model_type).named_parameters()), **dict(random(model_type).named_buffers())}
    torch.manual_seed(99)
    before = torch.get_rng_state()
    with torch.device("meta"):
        values = dict(random(model_type).initial_values())
    assert torch.equal(torch.get_rng_state(), before)
    assert values.keys() == built.keys()
    for name, value in built.items():
        assert torch.equal(values[name], value), name
    other = dict(random(model_type, seed=4).named_parameters())
    assert any(not torch.equal(other[name], values[name]) for name in other)


def test_no_value_depends_on_other_parameters() -> None:
    deeper = huggingface(model_type="llama", config=CONFIGS["llama"] | {"num_hidden_layers": 3}, seed=3)
    shallow = dict(random("llama").named_parameters())
    for name, value in shallow.items():
        assert torch.equal(value, deeper.get_parameter(name)), name


class Odd(nn.Module):
    """Does what constructors do: numbers, views, copies, loops, a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.full((3, 4), 2.0))
        with torch.no_grad():
            self.first[1:].mul_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            self.first.data[0, ::2] = torch.arange(2) + 7
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)
        self.second = nn.Parameter(self.first.detach().clone().T.contiguous() * self.scale)
        self.loose = torch.linspace(0, 1, 5).outer(torch.ones(2))
        self.register_buffer("mask", torch.tril(torch.ones(3, 3, dtype=torch.bool)))


def test_what_a_constructor_computes_is_computed_later() -> None:
    wanted = Odd()
    found = Construction(Odd)
    assert all(value.is_meta for value in [*found.module.parameters(), *found.module.buffers()])
    values = dict(found.values(0))
    named = {**dict(wanted.named_parameters()), **dict(wanted.named_buffers()), "loose": wanted.loose}
    assert values.keys() == named.keys()
    for name, value in named.items():
        assert torch.equal(values[name], value), name
    assert dict(found.values(0, frozenset(values) - {"mask"})).keys() == {"mask"}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_weights_of_a_folder(model_type: str, folders: dict[str, Path]) -> None:
    model = huggingface(path=folders[model_type], sequence_length=24)
    torch.testing.assert_close(logits(model), logits_of_transformers(folders[model_type]), rtol=1e-6, atol=1e-6)


def test_bfloat16_and_missing_prefixes(folders: dict[str, Path], tmp_path: Path) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"], dtype=torch.bfloat16)
    network.transformer.save_pretrained(tmp_path)
    assert not any(name.startswith("transformer.") for name in Weights(tmp_path))
    model = huggingface(path=tmp_path)
    assert all(value.dtype == torch.float32 for value in model.parameters())
    torch.testing.assert_close(logits(model), logits_of_transformers(tmp_path), rtol=1e-5, atol=1e-5)


def test_random_weights_for_the_config_of_a_folder(folders: dict[str, Path]) -> None:
    model = huggingface(path=folders["gpt2"], weights="random", config={"vocab_size": 91, "n_layer": 1}, seed=3)
    assert model.vocab_size == 91 and len(model.network.transformer.h) == 1
    assert not torch.allclose(logits(model), logits_of_transformers(folders["gpt2"])[..., :1])


def test_config_may_change_what_weights_do_not_depend_on(folders: dict[str, Path]) -> None:
    model = huggingface(path=folders["gpt2"], config={"attn_pdrop": 0.5, "resid_pdrop": 0.25})
    assert model.network.transformer.h[0].mlp.dropout.p == 0.25
    with pytest.raises(CheckpointError, match=r"has the shape \(83, 32\), its config means \(90, 32\)"):
        huggingface(path=folders["gpt2"], config={"vocab_size": 90})


def copy_with(folder: Path, target: Path, change) -> Path:
    """The folder with other tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_tensors_left_over_or_missing_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    more = copy_with(folders["llama"], tmp_path / "more", lambda t: t.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"has 1 tensors that a LlamaForCausalLM.*model\.extra\.weight"):
        huggingface(path=more)
    less = copy_with(folders["llama"], tmp_path / "less", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        huggingface(path=less)


def test_folders_that_hold_something_else(folders: dict[str, Path], tmp_path: Path, caplog) -> None:
    values = json.loads((folders["llama"] / "config.json").read_text())

    def folder(name: str, **changes: object) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values | changes))
        return tmp_path / name

    with pytest.raises(CheckpointError, match="holds no weights"):
        huggingface(path=folder("empty"))
    (folder("pickled") / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="as pickles"):
        huggingface(path=tmp_path / "pickled")
    with pytest.raises(CheckpointError, match="quantized"):
        huggingface(path=folder("quantized", quantization_config={"bits": 4}))
    with pytest.raises(ConfigError, match="no models of type `strange`"):
        huggingface(path=folder("strange", model_type="strange", auto_map={"AutoConfig": "code.Config"}))
    code = folder("code", auto_map={"AutoModelForCausalLM": "code.Model"})
    (code / "code.py").write_text("raise SystemExit('was run')")
    with caplog.at_level(logging.WARNING, "modalities"):
        assert type(huggingface(path=code, weights="random").network).__name__ == "LlamaForCausalLM"
    assert "auto_map" in caplog.text


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_an_export_is_the_same_class_with_the_same_logits(model_type: str, dtype, tmp_path: Path) -> None:
    model = random(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model)
    name = model.export(tmp_path, tensors.__getitem__, dtype=dtype, token_ids={"eos_token_id": 7})
    assert name == type(model.network).__name__
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [name] and config["eos_token_id"] == 7
    assert config["dtype"] == ("float32" if dtype is None else "bfloat16")
    found = model.compare(tmp_path, tensors.__getitem__)
    assert found.greedy == found.tokens
    again = huggingface(path=tmp_path, sequence_length=24)
    if dtype is None:
        torch.testing.assert_close(logits_of_transformers(tmp_path), before, rtol=1e-6, atol=1e-6)
        assert torch.equal(logits(again), before)


def test_a_damaged_export_is_noticed(tmp_path: Path) -> None:
    model = random("llama")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    model.export(tmp_path, tensors.__getitem__)
    tensors["network.model.norm.weight"] = tensors["network.model.norm.weight"] + 0.01
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight comes back otherwise"):
        model.compare(tmp_path, tensors.__getitem__)
