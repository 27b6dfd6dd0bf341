"""nanochat's model and loss, whole attention in every layer, in the plain loop with AdamW: SPEC.

It is another model: ReLU^2 instead of SwiGLU, norms without weights, query-key norm, value embeddings in every second
layer, capped logits. Width and depth are the case's, which gives as many weights in its products where the intermediate
size is 8/3 of the hidden size; the value embeddings come on top and are only looked up.
"""

import os
import sys

os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16")

import torch
from clock import parameters, spec
from loop import train


def main():
    wanted = spec()
    sys.path.insert(0, wanted["repository"])
    from nanochat.gpt import GPT, GPTConfig

    shape = wanted["shape"]
    torch.manual_seed(0)
    config = GPTConfig(
        sequence_len=shape["sequence_length"], vocab_size=shape["vocab_size"], n_layer=shape["layers"],
        n_head=shape["heads"], n_kv_head=shape["key_value_heads"], n_embd=shape["hidden_size"], window_pattern="L",
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=wanted["device"])
    model.init_weights()
    flops = model.estimate_flops()
    attention = 12 * shape["layers"] * shape["hidden_size"] * shape["sequence_length"]
    # Its weights are cast where they are used, so it needs no autocast.
    train(
        {**wanted, "precision": "its own"}, model, lambda running, tokens, targets: running(tokens, targets),
        parameters=parameters(model), matmul_parameters=model.num_matmul_params(), flops_per_token=flops,
        causal_flops_per_token=flops - attention / 2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
