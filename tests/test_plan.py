"""Planning without hardware: by hand, against what CPUs really keep, and as a command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modalities_cli.app import app
from modalities_cli.plan import Bytes, built
from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch
from modalities_core.training.optim import adamw, lion, muon, sgd
from modalities_core.training.parameters import as_module
from modalities_models.decoder import Decoder, decoder
from modalities_models.losses.cross_entropy import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_parallel.planning.devices import (
    DEVICES,
    gather_seconds,
    replicas_seconds,
)
from modalities_parallel.planning.knobs import knobs, way_to_fit
from modalities_parallel.planning.memory import optimizer_states
from modalities_parallel.planning.run import PlannedRun, estimated
from modalities_parallel.planning.trace import trace
from modalities_parallel.recomputation import whole_blocks

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "config_files" / "llama_1b_fsdp.yaml")
QUICK = str(ROOT / "config_files" / "quickstart.yaml")
LLAMA3_8B = (
    "model.model.preset=llama3-8b",
    "model.model.vocab_size=128256",
    "settings.sequence_length=8192",
    "settings.micro_batch_size=1",
    "trainer.batches.samples_per_step=8",
)
SMALL = {"vocab_size": 512, "sequence_length": 256, "hidden_size": 128, "layers": 3, "heads": 4, "attention": "sdpa"}
KINDS = {
    "llama": {"key_value_heads": 2},
    "qwen3": {"query_key_norm": "head", "head_size": 32},
    "gpt2": {"norm": "layer", "activation": "gelu", "bias": True, "positions": "absolute"},
    "gemma": {"norm_placement": "sandwich", "activation": "geglu", "tied_embeddings": True},
}


FEW = "trainer.batches.samples_per_step=128"
PIPELINE = ("trainer.executor.component=executor.pipeline", "trainer.executor.compile=blocks")
TRACES: dict[Any, Any] = {}


def llama(*overrides: str) -> PlannedRun:
    """Llama 3 8B on eight devices; all such runs share what going through the same model shows."""
    return replace(built(Path(CONFIG), (*LLAMA3_8B, *overrides), 8), traces=TRACES)


def on_meta(**numbers) -> tuple[Decoder, Batch]:
    with torch.device("meta"):
        model = decoder(**numbers)
        tokens = torch.empty(2, model.sequence_length, dtype=torch.int64)
    return model, Batch(tokens, tokens)


def test_llama_3_8b_on_eight_devices_by_hand() -> None:
    run = llama()
    estimate = estimated(run, DEVICES["h100"])
    held = estimate.memory
    parameters = 8_030_261_248
    block = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    root = 2 * 128256 * 4096 + 4096
    assert root + 32 * block == parameters
    assert held.weights == held.gradients == 4 * parameters // 8
    assert held.optimizer == 8 * parameters // 8
    assert held.copies == 0
    assert held.gathered == 2 * (root + 2 * block)
    assert held.unreduced == 2 * (root + block) + 4 * root
    # Of a block: norms 2 * 4096, attention 3 * 4096 + 2 * 1024, feed-forward 4096 + 4 * 14336, two bytes each.
    assert held.activations == pytest.approx(8192 * 32 * 83_968 * 2, rel=0.02)
    assert held.total == sum(held)
    # As Megatron-LM counts them, and the scores that flash attention computes again: 1/6 of 6 L H F S.
    operations = sum(operation.flops for operation in run.traced().operations) / 8192
    assert operations == pytest.approx(run.model.causal_flops_per_token(8192) + 32 * 4096 * 8192, rel=1e-6)
    assert run.model.flops_per_token(8192) == pytest.approx(57.9e9, rel=1e-3)
    assert 0 < estimate.mfu_causal < estimate.mfu < 1


def test_accumulating_keeps_whole_gradients() -> None:
    once, several = (llama(f"trainer.batches.samples_per_step={n}") for n in (8, 32))
    assert several.accumulation == 4
    more = estimated(several, DEVICES["h100"]).memory.unreduced - estimated(once, DEVICES["h100"]).memory.unreduced
    assert more == 4 * 8_030_261_248 - 2 * (2 * 128256 * 4096 + 4096)


def test_two_copies_of_the_model_hold_twice_as_much() -> None:
    shared, twice = (llama(f"world.dp_replicate={n}") for n in (1, 2))
    memory = [estimated(run, DEVICES["h100"]).memory for run in (shared, twice)]
    assert memory[1].weights == 2 * memory[0].weights
    assert memory[1].gathered == memory[0].gathered
    assert "dp_replicate: 1" in [knob.change for knob in knobs(twice, DEVICES["h100"])]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_the_forward_really_keeps(kind: str, recompute: bool) -> None:
    planned, batch = on_meta(**SMALL, **KINDS[kind])
    expected = trace(whole_blocks(planned) if recompute else planned, CrossEntropy(), batch).activations
    model = decoder(**SMALL, **KINDS[kind])
    known = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if recompute:
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda *given, forward=forward: checkpoint(forward, *given, use_reentrant=False)
    tokens = torch.randint(512, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens)
    kept[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage().nbytes()
    assert expected == pytest.approx(sum(kept.values()), rel=0.15)


def test_logits_whole_and_in_chunks() -> None:
    model, batch = on_meta(**SMALL | {"vocab_size": 50_000})
    whole = trace(model, CrossEntropy(chunk_tokens=None), batch)
    chunked = trace(model, CrossEntropy(chunk_tokens=64), batch)
    logits = 2 * 256 * 50_000 * 4
    # Logits, their log-probabilities and the gradient of them.
    assert 2 * logits < whole.loss < 4 * logits
    # The logits of an eighth, differentiated in place, and the gradient of the head.
    assert chunked.loss == pytest.approx(logits / 8 + 4 * 50_000 * 128, rel=0.02)
    assert whole.activations == chunked.activations


def test_half_precision_halves_activations() -> None:
    model, batch = on_meta(**SMALL)
    assert trace(model, CrossEntropy(), batch, torch.bfloat16).activations == pytest.approx(
        trace(model, CrossEntropy(), batch).activations / 2, rel=0.05
    )
    assert all(value.dtype == torch.float32 and value.grad is None for value in model.parameters())


def test_what_optimizers_remember() -> None:
    model, _ = on_meta(preset="gpt2", sequence_length=1024)
    count = model.parameter_count

    def per_parameter(optimizer: torch.optim.Optimizer) -> float:
        found = sum(optimizer_states(optimizer).values()) / count
        assert not optimizer.state
        return found

    assert per_parameter(adamw(model, 1e-3)) == per_parameter(torch.optim.AdamW(model.parameters())) == 8
    assert per_parameter(adamw(model, 1e-3, state_dtype="bf16")) == 4
    assert per_parameter(adamw(model, 1e-3, state_dtype="int8")) == pytest.approx(2.03, rel=0.01)
    assert per_parameter(sgd(model, 1e-3)) == per_parameter(lion(model, 1e-3)) == 4
    model, _ = on_meta(**SMALL)
    count = model.parameter_count
    matrices = sum(value.numel() for value in model.blocks.parameters() if value.ndim > 1)
    assert per_parameter(muon(model, 1e-3)) == pytest.approx(8 - 4 * matrices / count)


class NeedsValues(Decoder):
    """A decoder that looks at its tokens."""

    def forward(self, tokens_BT: Tensor, **named) -> Tensor:
        assert tokens_BT.sum().item() >= 0
        return super().forward(tokens_BT, **named)


def test_a_model_that_needs_values_is_refused_with_the_reason() -> None:
    run = built(Path(CONFIG), (), 64)
    as_module(run.model).__class__ = NeedsValues
    with pytest.raises(ConfigError, match="NeedsValues cannot be planned: .*values"):
        estimated(run, DEVICES["h100"])


def test_mixtures_of_experts_multiply_what_their_tokens_meet() -> None:
    experts = MixtureOfExperts(experts=4, experts_per_token=2, intermediate_size=64)
    model, batch = on_meta(**SMALL, feedforward=experts)
    flops = sum(operation.flops for operation in trace(model, CrossEntropy(), batch).operations) / (2 * 256)
    assert flops == pytest.approx(model.causal_flops_per_token(256) + 3 * 128 * 256, rel=0.02)


def test_collectives_by_hand() -> None:
    h100 = DEVICES["h100"]
    assert gather_seconds(1e9, 1, h100) == 0
    assert gather_seconds(1e9, 8, h100) == pytest.approx(7 / 8 * 1e9 / (0.8 * 450e9) + 7 * 3.4e-6)
    # Eight ports of 50 GB/s are the narrow place of two nodes.
    assert gather_seconds(1e9, 16, h100) == pytest.approx(15 / 16 * 1e9 / (0.8 * 400e9) + 14 * 3.4e-6 + 14e-6)
    assert replicas_seconds(1e9, 2, 8, h100) == pytest.approx(1e9 / (0.8 * 50e9) + 2 * 14e-6)
    assert replicas_seconds(1e9, 2, 4, h100) == pytest.approx(1e9 / (0.8 * 450e9) + 2 * 3.4e-6)


def test_every_device_has_a_peak() -> None:
    assert {name: device.peak for name, device in DEVICES.items()} == {
        "a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "mi300x": 1307.4e12,
    }  # fmt: skip


def test_what_does_not_fit_is_made_to_fit() -> None:
    run = llama("settings.micro_batch_size=4", "trainer.batches.samples_per_step=32")
    device = DEVICES["h100"]
    limit = 45e9
    before = estimated(run, device)
    assert before.memory.total > limit
    found = knobs(run, device)
    assert found[0].change.startswith("recomputation.blocks")
    assert any(knob.change.startswith("recomputation.selective") for knob in found)
    totals = [knob.estimate.memory.total for knob in found]
    assert totals == sorted(totals) and totals[-1] < before.memory.total
    assert {"offload: true", "tp: 2", "cp: 2"} <= {knob.change for knob in found}
    way = way_to_fit(run, device, limit)
    assert way[-1].estimate.memory.total <= limit < (way[-2].estimate if len(way) > 1 else before).memory.total


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_needs_no_data_and_says_what_fits() -> None:
    done = invoke(CONFIG, "--devices", "64", "--memory", "80GB")
    assert done.exit_code == 0, done.output
    assert "1,100,048,384" in done.output and "it fits" in done.output
    done = invoke(CONFIG, "--devices", "64", "--memory", "4GiB")
    assert "does not fit" in done.output and "micro_batch_size: 2" in done.output


def test_json_has_the_same_figures() -> None:
    done = invoke(CONFIG, *LLAMA3_8B, "--devices", "8", "--json", "--device", "h200")
    figures = json.loads(done.output)
    assert figures["parameters"] == 8_030_261_248 and figures["fits"] is True and figures["knobs"] == []
    assert figures["memory"]["total"] == sum(v for name, v in figures["memory"].items() if name != "total")
    assert figures["memory_limit"] == 141e9
    speed = figures["tokens_per_second_per_device"] * figures["devices"]
    assert speed * figures["seconds"]["step"] == pytest.approx(figures["tokens_per_step"])
    assert figures["mfu"] == pytest.approx(speed * figures["flops_per_token"] / 8 / 989e12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CONFIG, "--devices", "48"), "does not divide samples_per_step 256"),
        ((CONFIG, "--devices", "64", "world.dp_shard=8"), "dp_replicate 1 x dp_shard 8 = 8"),
        ((CONFIG, "--devices", "64", "world.tp=3"), "64 ranks cannot be split into tp = 3"),
        ((CONFIG, "--devices", "64", "world.tp=64"), "heads that .* cannot be shared out among tp 64"),
        ((CONFIG, "--devices", "64", "world.cp=64"), "heads that .* cannot be shared out among cp 64"),
        ((CONFIG, "--devices", "64", "world.ep=8"), "has no experts"),
        ((CONFIG, "--devices", "64", "world.pp=8"), "executor.pipeline"),
        ((CONFIG, "--devices", "64", "world.pp=8", *PIPELINE, FEW), "1f1b on 8 stages needs at least 8 micro batches"),
        ((QUICK, "--devices", "2", "trainer.batches.samples_per_step=32"), "each train their own copy|world of 1"),
    ],
)
def test_what_cannot_run_on_so_many_devices_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code != 0
    assert done.exception is not None
    assert re.search(message, str(done.exception)), str(done.exception)


def test_sizes() -> None:
    kind = Bytes()
    assert [kind.convert(text, None, None) for text in ("80GB", "80", "80 gib", "1.5TB")] == [
        80e9, 80e9, 80 * 2**30, 1.5e12,
    ]  # fmt: skip
