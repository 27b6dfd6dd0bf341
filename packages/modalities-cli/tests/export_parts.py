"""Small runs to export, and what their tests have in common."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner

from modalities_cli.app import app
from modalities_cli.run import train

STEPS = 20
TEXTS = ["the cat sat on the mat", "a dog ran over the green hill", "birds sing where the river is wide"] * 60
CONFIG = """
version: 1
settings: {data: DATA}
tokenizer: {component: tokenizer.huggingface, path: "${settings.data}/tokenizer.json"}
world: {component: world.auto}
model:
  component: parallel.fsdp2
  world: ${world}
  param_dtype: fp32
  model: {component: model.decoder, MODEL}
trainer:
  component: trainer.default
  world: ${world}
  steps: 20
  executor: {component: executor.plain, model: "${model}", loss: {component: loss.cross_entropy}, world: "${world}"}
  optimizer: {component: optimizer.adamw, model: "${model}", lr: 1e-2}
  schedule: {component: schedule.constant}
  batches:
    component: batches.shuffled
    dataset: {component: dataset.packed, path: "${settings.data}/packed", sequence_length: 24}
    world: ${world}
    samples_per_step: 4
    micro_batch_size: 4
  checkpoints: {component: checkpoints.keep, format: {component: checkpoint_format.sharded}, every: 10}
  sinks: []
"""
SIZE = "vocab_size: 300, sequence_length: 32, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 48"
MODELS = {
    "llama": f"{SIZE}, key_value_heads: 1, vocab_multiple: 64",
    "gemma2": f"{SIZE}, norm_placement: sandwich, activation: geglu, tied_embeddings: true,"
    " attention_windows: [6, null], attention_softcap: 20.0, logit_softcap: 10.0,"
    " embedding_multiplier: 5.656854249492381, norm_eps: 1e-6",
    "qwen3_moe": f"{SIZE}, query_key_norm: head, feedforward: {{component: feedforward.mixture_of_experts, experts: 4,"
    " experts_per_token: 2, intermediate_size: 24, balance_rate: 0.0}",
    "gpt2": "preset: gpt2, sequence_length: 32, hidden_size: 32, layers: 2, heads: 2, vocab_multiple: 128",
}


class Runs:
    """A run of each model, trained for 20 steps through the real loop when it is first asked for."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder

    def __getitem__(self, name: str) -> Path:
        if not (self.folder / name).exists():
            config = self.folder / f"{name}.yaml"
            config.write_text(CONFIG.replace("DATA", str(self.data)).replace("MODEL", MODELS[name]))
            train(config, (), self.folder / name)
        return self.folder / name


def invoke(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def our_model(run: Path):
    from modalities_cli.wiring import open_run, trained_model

    return trained_model(open_run(run), run)[0].eval()


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model.head(model(torch.tensor([ids])))[0, -1].argmax())]
    return ids
