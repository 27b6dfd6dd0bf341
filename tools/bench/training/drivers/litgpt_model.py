"""litgpt's model and its chunked cross entropy, called as in its pretraining, in the plain loop: SPEC."""

import torch
from clock import parameters, spec
from litgpt.model import GPT, Config
from litgpt.utils import chunked_cross_entropy
from loop import train


def main():
    wanted = spec()
    shape = wanted["shape"]
    torch.manual_seed(0)
    config = Config(
        name="bench", block_size=shape["sequence_length"], vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"], n_layer=shape["layers"], n_head=shape["heads"],
        n_query_groups=shape["key_value_heads"], n_embd=shape["hidden_size"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", norm_eps=1e-5,
        intermediate_size=shape["intermediate_size"], rope_base=shape["rope_theta"],
    )  # fmt: skip
    with torch.device(wanted["device"]):
        model = GPT(config)
    for value in model.parameters():
        if value.dim() == 2:
            torch.nn.init.normal_(value, std=0.02)

    def loss_of(running, tokens, targets):
        return chunked_cross_entropy(running(tokens), targets)

    train(wanted, model, loss_of, parameters=parameters(model))


if __name__ == "__main__":
    main()
