"""Generation on a CPU: modalities-models and transformers with the same weights, in turn, on the same threads.

    python tools/bench/generation.py --rounds 3 --new-tokens 32
    python tools/bench/generation.py --save benchmarks/results/generation

A decoder of ours and transformers' Llama get the same weights and write the same greedy text after the same prompts.
Reading the prompt is measured by writing one token; what the others take is decoding. Seconds are of the CPU, all
threads together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import turns

OURS, THEIRS = "modalities-models", "transformers"
SHAPES: dict[str, dict[str, Any]] = {
    "2M": {"vocab_size": 2048, "hidden_size": 128, "layers": 8, "heads": 4, "key_value_heads": 2},
    "60M": {"vocab_size": 32000, "hidden_size": 512, "layers": 8, "heads": 8, "key_value_heads": 4},
}
NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm", "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
    "feedforward.gate": "mlp.gate_proj", "feedforward.up": "mlp.up_proj", "feedforward.down": "mlp.down_proj",
}  # fmt: skip

Texts = list[list[int]]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="of the model (default: all)")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="(default: both)")
    parser.add_argument("--batch", action="append", type=int, help="prompts at once (default: 1 and 8)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of both (default: 1)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args(words)


def pair(shape: dict[str, Any], dtype: torch.dtype, length: int) -> tuple[Any, Any]:
    """Our decoder and transformers' Llama with its weights."""
    import transformers

    from modalities_models.decoder import decoder

    ours = decoder(**shape, sequence_length=length)
    a = ours.architecture
    config = transformers.LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
        num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.key_value_heads,
        head_dim=a.head_size, max_position_embeddings=length, rms_norm_eps=a.norm_eps, tie_word_embeddings=False,
        rope_theta=a.rope_theta,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            value.copy_(ours.state_dict()[our_name(name)][: value.shape[0]])
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def our_name(name: str) -> str:
    """The name of one of transformers' tensors in our decoder."""
    ours = {theirs: ours for ours, theirs in NAMES.items()}
    owner, _, leaf = name.rpartition(".")
    if owner.startswith("model.layers."):
        _, _, layer, part = owner.split(".", 3)
        return f"blocks.{layer}.{ours[part]}.{leaf}"
    return f"{ours[owner]}.{leaf}"


def writers(ours: Any, theirs: Any, prompts: Texts) -> dict[str, Callable[[int], Texts]]:
    """Each library's greedy continuation of ``prompts`` by a number of tokens, none of which ends it."""
    from modalities_models.generation import Sampling, generate_batch

    ids = torch.tensor(prompts)

    def write_ours(count: int) -> Texts:
        texts: Texts = [[] for _ in prompts]
        for new in generate_batch(ours, prompts, count, Sampling(temperature=0)):
            assert new.token is not None
            texts[new.prompt].append(new.token)
        return texts

    def write_theirs(count: int) -> Texts:
        found = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return {OURS: write_ours, THEIRS: write_theirs}


def seconds(write: Callable[[int], Texts], count: int) -> tuple[float, float]:
    """CPU and wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    write(count)
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(name: str, dtype: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: both libraries in turn, and the ratios of each round."""
    length = options.prompt_tokens + options.new_tokens
    ours, theirs = pair(SHAPES[name], getattr(torch, dtype), length)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(ours.vocab_size, (batch, options.prompt_tokens), generator=generator).tolist()
    known = writers(ours, theirs, prompts)
    texts = [write(options.new_tokens) for write in known.values()]
    same = sum(a == b for one, other in zip(*texts, strict=True) for a, b in zip(one, other, strict=True))

    def one(who: str, _: int) -> dict[str, float]:
        (first, first_wall), (whole, wall) = seconds(known[who], 1), seconds(known[who], options.new_tokens)
        return {"first": first, "decode": whole - first, "whole": whole, "decode_wall": wall - first_wall}

    rounds = turns.in_turn([OURS, THEIRS], options.rounds, one)
    pairs = list(zip(rounds[OURS], rounds[THEIRS], strict=True))
    ratios = {key: [other[key] / mine[key] for mine, other in pairs] for key in ("first", "decode", "decode_wall")}
    row = {
        "shape": name, "dtype": dtype, "batch": batch, "parameters": ours.parameter_count,
        "same_tokens": same / (batch * options.new_tokens),
        "tokens_per_cpu_second": {
            who: batch * (options.new_tokens - 1) / statistics.median(entry["decode"] for entry in found)
            for who, found in rounds.items()
        },
        "ratios": {key: statistics.median(found) for key, found in ratios.items()},
        "all_ratios": ratios, "rounds": rounds,
    }  # fmt: skip
    print(f"{name} {dtype} batch {batch}: {row['ratios']}", file=sys.stderr, flush=True)
    return row


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    for row in result["rows"]:
        speed, decode = row["tokens_per_cpu_second"], row["all_ratios"]["decode"]
        rows.append([
            f"{row['shape']} {row['dtype']}", row["batch"], f"{speed[OURS]:,.0f}", f"{speed[THEIRS]:,.0f}",
            f"{row['ratios']['decode']:.2f}x", f"{min(decode):.2f} to {max(decode):.2f}",
            f"{row['ratios']['decode_wall']:.2f}x", f"{row['ratios']['first']:.2f}x", f"{row['same_tokens']:.1%}",
        ])  # fmt: skip
    headings = [
        "model", "prompts", "our tokens/CPU s", "theirs", "decoding", "all rounds", "by the clock", "first token",
        "same tokens",
    ]  # fmt: skip
    return "\n".join([
        "# Generation: modalities-models beside transformers", "",
        f"Greedy decoding of {result['new_tokens']} tokens after prompts of {result['prompt_tokens']} on "
        f"{result['threads']} thread(s), the same weights in both, in turn. A ratio is transformers' CPU seconds over "
        f"ours within one round, so above 1 we are faster; given is the median of {result['rounds']} round(s).", "",
        turns.markdown(headings, rows), "",
        "In bfloat16 two right implementations round differently, so texts of random weights part at near ties.", "",
        f"- command: `{result['command']}`", f"- commit: {result['commit']}", f"- date: {result['date']}",
        f"- machine: {result['cpu']}, {result['cores']} cores, load {result['load']:.1f} at the start",
        f"- versions: {json.dumps(result['versions'])}",
    ])  # fmt: skip


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    result = {
        **turns.provenance(("--save",)), "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens,
        "threads": options.threads, "rounds": options.rounds,
        "versions": {name: version(name) for name in ("modalities-models", "torch", "transformers")},
    }  # fmt: skip
    result["rows"] = [
        measure(shape, dtype, batch, options)
        for shape in options.shape or SHAPES
        for dtype in options.dtype or ("float32", "bfloat16")
        for batch in options.batch or (1, 8)
    ]
    text = report(result)
    print(text)
    if options.save:
        turns.save(options.save, result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
