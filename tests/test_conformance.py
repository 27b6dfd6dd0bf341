"""Every registered component is what its kind promises: one configuration per name, built and held to its Protocol."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities_core import interfaces
from modalities_core.config.document import parse
from modalities_core.config.graph import Graph
from modalities_core.registry import registry
from modalities_data.batch_sizes import BatchSizes
from modalities_parallel.planning.world import planning

WORLD = "{component: world.alone, device: cpu}"
NANO = "{component: model.decoder, preset: nano, sequence_length: 32, vocab_size: 300}"
LOREM = "{component: dataset.lorem_ipsum, sequence_length: 32, samples: 8}"
BATCHES = f"{{component: batches.shuffled, dataset: {LOREM}, world: {WORLD}, samples_per_step: 4, micro_batch_size: 2}}"
HELD_OUT = f"{{component: batches.held_out, dataset: {LOREM}, world: {WORLD}, micro_batch_size: 3}}"
LOSS = "{component: loss.cross_entropy}"
EXECUTOR = f"{{component: executor.plain, model: {NANO}, loss: {LOSS}, world: {WORLD}}}"
TWO_STAGES = "{component: world.auto, pp: 2}"
PIPELINE = (
    f"{{component: executor.pipeline, model: {{component: parallel.fsdp2, model: {NANO}, world: {TWO_STAGES}}}, "
    f"loss: {LOSS}, world: {TWO_STAGES}}}"
)
FORMAT = "{component: checkpoint_format.sharded}"
BYTES = "{component: tokenizer.bytes}"
VISION = "{component: model.vision_transformer, image_size: 8, patch_size: 4, hidden_size: 16, layers: 1, heads: 2}"
COCA = (
    f"{{component: model.coca, vision: {VISION}, vocab_size: 300, sequence_length: 8, hidden_size: 16, text_layers: 1, "
    "multimodal_layers: 1, heads: 2, queries: 4, embedding_size: 8}"
)
EVALUATION = f"{{component: evaluation.held_out, name: h, batches: {HELD_OUT}, every: 2}}"
OPTIMIZER = f"{{component: optimizer.adamw, model: {NANO}, lr: 1e-3}}"

# What to build for each name, and which Protocol it has to satisfy; None where the kind has none of its own.
EXAMPLES: dict[str, tuple[str, type | None]] = {
    "world.alone": (WORLD, interfaces.World),
    "world.auto": ("{component: world.auto}", interfaces.World),
    "model.decoder": (NANO, interfaces.Model),
    "model.pretrained": ("{component: model.pretrained, path: DATA/hugging_face}", interfaces.Model),
    "model.huggingface": ("{component: model.huggingface, path: DATA/hugging_face}", interfaces.Model),
    "model.vision_transformer": (VISION, None),
    "model.coca": (COCA, interfaces.Model),
    "parallel.fsdp2": (f"{{component: parallel.fsdp2, model: {NANO}, world: {WORLD}}}", interfaces.Model),
    "precision.float8": (
        f"{{component: precision.float8, model: {NANO}, world: {WORLD}, emulate: true}}",
        interfaces.Model,
    ),
    "recomputation.blocks": (f"{{component: recomputation.blocks, model: {NANO}, every: 2}}", interfaces.Model),
    "recomputation.budget": (f"{{component: recomputation.budget, model: {NANO}, share: 0.5}}", interfaces.Model),
    "recomputation.selective": (f"{{component: recomputation.selective, model: {NANO}}}", interfaces.Model),
    "feedforward.mixture_of_experts": (
        "{component: feedforward.mixture_of_experts, experts: 4, experts_per_token: 2, intermediate_size: 32}",
        None,
    ),
    "rope_scaling.linear": ("{component: rope_scaling.linear, factor: 2}", None),
    "rope_scaling.ntk": ("{component: rope_scaling.ntk, original_length: 64}", None),
    "rope_scaling.yarn": ("{component: rope_scaling.yarn, factor: 4, original_length: 64}", None),
    "rope_scaling.llama3": ("{component: rope_scaling.llama3, factor: 8, original_length: 64}", None),
    "loss.cross_entropy": (LOSS, interfaces.Loss),
    "loss.liger_cross_entropy": ("{component: loss.liger_cross_entropy}", interfaces.Loss),
    "loss.coca": (f"{{component: loss.coca, world: {WORLD}}}", interfaces.Loss),
    "executor.plain": (EXECUTOR, interfaces.Executor),
    "executor.pipeline": (PIPELINE, interfaces.Executor),
    "optimizer.adamw": (OPTIMIZER, torch.optim.Optimizer),
    "optimizer.adam": (f"{{component: optimizer.adam, model: {NANO}, lr: 1e-3}}", torch.optim.Optimizer),
    "optimizer.sgd": (
        f"{{component: optimizer.sgd, model: {NANO}, lr: 1e-2, groups: [{{parameters: ['*norm*'], lr: 1e-3}}]}}",
        torch.optim.Optimizer,
    ),
    "optimizer.lion": (f"{{component: optimizer.lion, model: {NANO}, lr: 1e-4}}", torch.optim.Optimizer),
    "optimizer.muon": (f"{{component: optimizer.muon, model: {NANO}, lr: 1e-3}}", torch.optim.Optimizer),
    "dataset.lorem_ipsum": (LOREM, interfaces.Dataset),
    "dataset.packed": ("{component: dataset.packed, path: DATA/train, sequence_length: 32}", interfaces.Dataset),
    "dataset.best_fit": ("{component: dataset.best_fit, path: DATA/train, sequence_length: 32}", interfaces.Dataset),
    "dataset.part": (f"{{component: dataset.part, dataset: {LOREM}, end: 0.5}}", interfaces.Dataset),
    "dataset.image_text": (
        f"{{component: dataset.image_text, path: DATA/pairs, tokenizer: {BYTES}, sequence_length: 9}}",
        interfaces.Dataset,
    ),
    "dataset.mixture": (
        f"{{component: dataset.mixture, datasets: [{LOREM}, {LOREM}], weights: [3, 1], samples: 30}}",
        interfaces.Dataset,
    ),
    "batches.shuffled": (BATCHES, interfaces.Batches),
    "batches.in_order": (
        f"{{component: batches.in_order, dataset: {LOREM}, world: {WORLD}, samples_per_step: 4, micro_batch_size: 2}}",
        interfaces.Batches,
    ),
    "batch_size.linear": ("{component: batch_size.linear, samples: 4, increment: 4, steps: 10}", BatchSizes),
    "batch_size.stages": (
        "{component: batch_size.stages, stages: [{from_step: 0, samples: 4}, {from_step: 9, samples: 8}]}",
        BatchSizes,
    ),
    "batches.held_out": (HELD_OUT, interfaces.HeldOut),
    "tokenizer.bytes": ("{component: tokenizer.bytes}", interfaces.Tokenizer),
    "tokenizer.huggingface": (
        "{component: tokenizer.huggingface, path: DATA/tokenizer.json}",
        interfaces.Tokenizer,
    ),
    "tokenizer.sentencepiece": ("{component: tokenizer.sentencepiece, path: DATA/some.model}", interfaces.Tokenizer),
    "tokenizer.tiktoken": (
        "{component: tokenizer.tiktoken, path: DATA/bytes.tiktoken, pattern: cl100k}",
        interfaces.Tokenizer,
    ),
    "schedule.constant": ("{component: schedule.constant}", interfaces.Schedule),
    "schedule.linear": ("{component: schedule.linear, warmup_steps: 2, steps: 10}", interfaces.Schedule),
    "schedule.warmup_cosine": (
        "{component: schedule.warmup_cosine, warmup_steps: 2, steps: 10}",
        interfaces.Schedule,
    ),
    "schedule.exponential": ("{component: schedule.exponential, warmup_steps: 2, steps: 10}", interfaces.Schedule),
    "schedule.inverse_sqrt": ("{component: schedule.inverse_sqrt, warmup_steps: 2}", interfaces.Schedule),
    "schedule.wsd": (
        "{component: schedule.wsd, warmup_steps: 2, decay_steps: 2, steps: 10}",
        interfaces.Schedule,
    ),
    "schedule.step": ("{component: schedule.step, every: 3, gamma: 0.5}", interfaces.Schedule),
    "schedule.one_cycle": ("{component: schedule.one_cycle, steps: 10}", interfaces.Schedule),
    "checkpoint_format.sharded": (FORMAT, interfaces.CheckpointFormat),
    "checkpoints.keep": (f"{{component: checkpoints.keep, format: {FORMAT}, every: 2}}", None),
    "evaluation.held_out": (EVALUATION, None),
    "initialization.plain": ("{component: initialization.plain}", None),
    "initialization.scaled": ("{component: initialization.scaled}", None),
    "initialization.llama": ("{component: initialization.llama}", None),
    "initialization.pretrained": ("{component: initialization.pretrained, path: DATA/hugging_face}", None),
    "generation.text": (f"{{component: generation.text, model: {NANO}, tokenizer: {BYTES}}}", interfaces.TextGenerator),
    "hook.profile": ("{component: hook.profile, start: [2, 9], ranks: [0]}", interfaces.Hook),
    "hook.samples": (
        f"{{component: hook.samples, generator: {{component: generation.text, model: {NANO}, tokenizer: {BYTES}}}, "
        "prompts: ['def '], every: 5}",
        interfaces.Hook,
    ),
    "sink.console": ("{component: sink.console}", interfaces.Sink),
    "sink.jsonl": ("{component: sink.jsonl}", interfaces.Sink),
    "sink.wandb": ("{component: sink.wandb, mode: offline}", interfaces.Sink),
    "sink.tensorboard": ("{component: sink.tensorboard}", interfaces.Sink),
    "sink.mlflow": ("{component: sink.mlflow, tracking_uri: 'sqlite:///runs.db'}", interfaces.Sink),
    "trainer.default": (
        f"{{component: trainer.default, world: {WORLD}, executor: {EXECUTOR}, optimizer: {OPTIMIZER}, "
        f"schedule: {{component: schedule.constant}}, batches: {BATCHES}, steps: 2}}",
        None,
    ),
}

# For how many ranks a component is planned, where one process by itself cannot build it.
PLANNED = {"executor.pipeline": 2}

# The package of an extra that a component needs to be built, where the development environment does not have it.
EXTRAS = {
    "loss.liger_cross_entropy": "liger_kernel",
    "precision.float8": "torchao",
    "sink.wandb": "wandb",
    "sink.tensorboard": "tensorboard",
    "sink.mlflow": "mlflow",
}


def build(text: str, data: Path) -> Any:
    document = parse(f"version: 1\nthing: {text}\n".replace("DATA", str(data)), "c.yaml", data)
    graph = Graph(document, registry(), {"thing": object})
    graph.check()
    return graph.build("thing")


def test_every_registered_name_has_an_example() -> None:
    ours = {entry.name for entry in registry() if entry.distribution.startswith("modalities-")}
    assert {name for name in ours if "inverse_square_root" not in name} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_conforms(name: str, small_data: Path) -> None:
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    text, protocol = EXAMPLES[name]
    with planning(PLANNED[name]) if name in PLANNED else nullcontext():
        built = build(text, small_data)
    if protocol is not None:
        assert isinstance(built, protocol)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("schedule.")])
def test_schedules_are_pure_and_within_bounds(name: str, small_data: Path) -> None:
    schedule = build(EXAMPLES[name][0], small_data)
    factors = [schedule(step) for step in range(10)]
    assert factors == [schedule(step) for step in range(10)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0.4


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("dataset.")])
def test_datasets_give_what_they_announce(name: str, small_data: Path) -> None:
    import numpy as np

    dataset = build(EXAMPLES[name][0], small_data)
    samples = dataset.gather(np.array([0, len(dataset) - 1, 0]))
    assert samples.tokens.shape == (3, dataset.sequence_length + 1)
    assert samples.tokens.max() <= dataset.largest_id
    assert (samples.tokens[0] == samples.tokens[2]).all()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("tokenizer.")])
@pytest.mark.parametrize("text", ["", "def f(x):\n    return x\n", "naïve 🙂 \x00 text"])
def test_tokenizers_give_back_the_text(name: str, text: str, small_data: Path) -> None:
    tokenizer = build(EXAMPLES[name][0], small_data)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    flat, offsets = tokenizer.encode_flat([text, "", text])
    assert flat.tolist() == [*ids, *ids]
    assert offsets.tolist() == [0, len(ids), len(ids), 2 * len(ids)]
    assert max([*ids, tokenizer.end_of_document]) < tokenizer.vocab_size
