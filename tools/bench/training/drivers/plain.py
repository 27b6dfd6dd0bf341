"""A plain PyTorch Llama, in the manner of nanoGPT: SPEC."""

import torch
from clock import parameters, spec
from loop import train
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        d, self.heads, self.groups = shape["hidden_size"], shape["heads"], shape["key_value_heads"]
        self.size = d // self.heads
        self.qkv = nn.Linear(d, (self.heads + 2 * self.groups) * self.size, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        wide, narrow = self.heads * self.size, self.groups * self.size
        q, k, v = self.qkv(x).split([wide, narrow, narrow], dim=2)
        q, k, v = (part.view(b, t, -1, self.size).transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        d, wide = shape["hidden_size"], shape["intermediate_size"]
        self.attention_norm, self.feedforward_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.attention = Attention(shape)
        self.gate, self.up = nn.Linear(d, wide, bias=False), nn.Linear(d, wide, bias=False)
        self.down = nn.Linear(wide, d, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.feedforward_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, shape):
        super().__init__()
        d = shape["hidden_size"]
        self.embedding = nn.Embedding(shape["vocab_size"], d)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape["layers"])])
        self.norm = nn.RMSNorm(d, eps=1e-5)
        self.head = nn.Linear(d, shape["vocab_size"], bias=False)
        for value in self.parameters():
            if value.dim() == 2:
                nn.init.normal_(value, std=0.02)
        size = d // shape["heads"]
        inverse = shape["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(shape["sequence_length"]), inverse)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main():
    wanted = spec()
    torch.manual_seed(0)
    with torch.device(wanted["device"]):
        model = Llama(wanted["shape"])
    train(wanted, model, lambda running, tokens, targets: running(tokens, targets), parameters=parameters(model))


if __name__ == "__main__":
    main()
