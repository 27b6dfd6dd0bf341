"""torchtitan's own trainer on a Llama of the case's numbers: SPEC. One CUDA device.

Its defaults stand: FSDP2 on one rank, CUDA graphs, chunked loss, FlexAttention; compiled, as its benchmarks are.
Blocks are recomputed only where the spec says so.
"""

import os
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from clock import Clock, spec
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models import llama3
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

ALONE = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29617"
}  # fmt: skip


def small(weight):
    torch.nn.init.normal_(weight, std=0.02)


class Windows(BaseDataLoader):
    """Random windows of the token file."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The folder is ``dataset_path``."""

        dtype: str = "<u2"

    def __init__(self, config, *, seq_len, local_batch_size, **kwargs):
        self.data = np.memmap(f"{config.dataset_path}/00000.bin", config.dtype, "r")
        self.length, self.size = seq_len, local_batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        positions = torch.arange(self.length, dtype=torch.int32).repeat(self.size, 1)
        while True:
            starts = torch.randint(len(self.data) - self.length - 1, (self.size,), generator=generator).tolist()
            windows = torch.from_numpy(
                np.stack([self.data[at : at + self.length + 1] for at in starts]).astype(np.int64)
            )
            yield {"input": windows[:, :-1].contiguous(), "positions": positions}, windows[:, 1:].contiguous()

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


class NoTokenizer(BaseTokenizer):
    """The data are ids already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to say."""

    def __init__(self, config, **kwargs):
        super().__init__()

    def encode(self, *args, **kwargs):
        return []

    def decode(self, *args, **kwargs):
        return ""

    def get_vocab_size(self):
        return 0


def model_spec(wanted):
    shape = wanted["shape"]
    d, vocabulary, heads = shape["hidden_size"], shape["vocab_size"], shape["heads"]
    config = llama3.Llama3Model.Config(
        dim=d, vocab_size=vocabulary,
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=d, param_init={"weight": small}),
        norm=RMSNorm.Config(normalized_shape=d, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=d, out_features=vocabulary, param_init={"weight": small}),
        layers=llama3._build_llama3_layers(
            n_layers=shape["layers"], dim=d, n_heads=heads, n_kv_heads=shape["key_value_heads"],
            hidden_dim=shape["intermediate_size"], attn_backend=wanted.get("attention", "flex"),
            rope=ComplexRoPE.Config(
                dim=d // heads, max_seq_len=shape["sequence_length"], theta=shape["rope_theta"], scaling="none"
            ),
        ),
    )  # fmt: skip
    if wanted.get("fp8"):
        from torchtitan.components.quantization import Float8LinearConverter

        converter = Float8LinearConverter.Config(model_compile_enabled=True, filter_fqns=["lm_head"])
        config = converter.build().convert(config)
    return ModelSpec(
        name="llama3", flavor="bench", model=config, parallelize_fn=llama3.parallelize_llama, pipelining_fn=None,
        post_optimizer_build_fn=None, state_dict_adapter=None,
    )  # fmt: skip


def config_of(wanted, folder):
    steps = wanted["warmup"] + wanted["steps"]
    return Trainer.Config(
        model_spec=model_spec(wanted), dump_folder=folder,
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=wanted["shape"]["vocab_size"])
        ),
        tokenizer=NoTokenizer.Config(),
        dataloader=Windows.Config(dataset_path=wanted["data"], dtype=wanted["dtype"]),
        optimizer=default_adamw(lr=wanted["lr"]),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=wanted["micro_batch_size"], global_batch_size=wanted["samples_per_step"],
            seq_len=wanted["shape"]["sequence_length"], steps=steps,
            dtype="bfloat16" if wanted["weights"] == "bf16" else "float32",
        ),
        metrics=MetricsProcessor.Config(log_freq=wanted["log_every"]),
        compile=CompileConfig(enable=wanted["compile"]),
        activation_checkpoint=SelectiveAC.Config() if wanted.get("recompute") else None,
    )  # fmt: skip


def main():
    wanted = spec()
    os.environ.update(ALONE)
    clock = Clock(wanted)
    with tempfile.TemporaryDirectory() as folder:
        trainer = config_of(wanted, folder).build()
        one_step, log = trainer.train_step, trainer.metrics_processor.log

        def step(iterator):
            one_step(iterator)
            clock.step()

        def note(number, loss, *rest, **more):
            clock.losses[number] = loss
            log(number, loss, *rest, **more)

        trainer.train_step, trainer.metrics_processor.log = step, note
        count = sum(value.numel() for part in trainer.model_parts for value in part.parameters())
        clock.start()
        trainer.train()
        clock.tell(parameters=count)
        sys.stdout.flush()
        trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
