"""Text to packed tokens: modalities-data and its peers on the same corpus, in turn, process start included.

    python tools/bench/data/pack.py --megabytes 10 --rounds 1
    python tools/bench/data/pack.py --megatron ../Megatron-LM --save benchmarks/results/data-pack

Makes the corpus from text on this machine, trains one tokenizer, installs each peer in an environment of its own under
--cache (torch among it: some gigabytes), checks that all write the same token bytes, and prints a table. Ratios are per
CPU second of the whole process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import environments
import turns
import xxhash
from corpus import END_OF_DOCUMENT, beginnings, make
from packers import Job, Packer, ours, packers, write_tokenizer_config

OURS = "modalities (fastokens)"
START_DOCUMENTS, START_CHARACTERS = 40, 500
TRAINING_BYTES = 20_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modalities-bench"
    parser.add_argument("--cache", type=Path, default=default_cache, help="corpus, tokenizer and environments")
    parser.add_argument("--megabytes", type=int, default=100, help="of distinct text (default: 100)")
    parser.add_argument("--text", type=Path, action="append", default=[], help="another folder to take text from")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes, and cores to run on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron", type=Path, help="a copy of the Megatron-LM repository")
    parser.add_argument("--only", action="append", default=[], help="packers whose name has this word")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one command")
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args()


def trained_tokenizer(cache: Path, corpus: Path, vocab_size: int) -> Path:
    """A folder with a byte-level BPE tokenizer, trained once on the start of the corpus."""
    from modalities_data.tokenizers.train import train_tokenizer

    folder = cache / f"tokenizer-{vocab_size}-{corpus.stem}"
    if not (folder / "tokenizer_config.json").is_file():
        print(f"training {folder.name} ...", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(_sample(corpus), folder / "tokenizer.json", vocab_size, END_OF_DOCUMENT)
        write_tokenizer_config(folder)
    return folder


def _sample(corpus: Path):
    taken = 0
    with corpus.open("rb") as stream:
        for line in stream:
            taken += len(line)
            if taken > TRAINING_BYTES:
                return
            yield json.loads(line)["text"]


def measured(packer: Packer, made: environments.Made, source: Path, tokenizer: Path, options: argparse.Namespace):
    """Pack once; usage, and what the token bytes are."""
    with tempfile.TemporaryDirectory(dir=options.cache) as folder:
        job = Job(source, Path(folder), tokenizer, options.workers)
        commands = packer.commands(job, made)
        usage = turns.run(
            commands, cores=options.workers, timeout=options.timeout, folder=job.output, environment=made.variables()
        )
        digest, size = xxhash.xxh3_128(), 0
        for part in packer.tokens(job):
            digest.update(part)
            size += len(part)
    return usage, {"token_bytes": size, "token_digest": digest.hexdigest()}


def main() -> int:
    options = arguments()
    options.cache = options.cache.resolve()
    megatron = options.megatron.resolve() if options.megatron else None
    corpus, facts = make(options.cache, options.megabytes, more_folders=options.text)
    tokenizer = trained_tokenizer(options.cache, corpus, options.vocab_size)
    start = beginnings(corpus, options.cache / "start.jsonl", START_DOCUMENTS, START_CHARACTERS)
    chosen = {
        name: packer
        for name, packer in packers(megatron).items()
        if name == OURS or not options.only or any(word in name for word in options.only)
    }
    missing = {} if megatron else {"Megatron-LM": "skipped: give a copy of its repository with --megatron PATH"}
    ready, versions, starts = {}, {}, {}
    for name, packer in chosen.items():
        try:
            made = environments.make(options.cache, packer.environment) if packer.environment else ours()
            # The first start fills caches of compiled code, the second one counts.
            measured(packer, made, start, tokenizer, options)
            starts[name] = measured(packer, made, start, tokenizer, options)[0]
        except (environments.InstallError, turns.RunError, OSError) as error:
            if name == OURS:
                raise SystemExit(f"error: {name}: {error}") from None
            missing[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        ready[name], versions[name] = made, made.versions

    def one(name: str, number: int) -> dict | None:
        try:
            usage, tokens = measured(chosen[name], ready[name], corpus, tokenizer, options)
        except (turns.RunError, OSError) as error:
            missing[name] = str(error)
            return None
        print(f"round {number + 1}: {name}: {usage.cpu:.2f} CPU s, {usage.wall:.2f} s", file=sys.stderr, flush=True)
        last = usage.output.strip().splitlines()[-1:] if name.startswith("plain") else []
        return {
            "wall": usage.wall, "cpu": usage.cpu, "peak_rss": usage.peak_rss, **tokens,
            **(json.loads(last[0]) if last else {}),
        }  # fmt: skip

    rounds = turns.in_turn(list(ready), options.rounds, one)
    table = {name: turns.medians(found) for name, found in rounds.items()}
    result = {
        **turns.provenance(("--cache", "--megatron", "--text", "--save")),
        "corpus": facts, "vocab_size": options.vocab_size, "workers": options.workers, "rounds": options.rounds,
        "versions": versions, "missing": missing, "start_cpu": {name: starts[name].cpu for name in table},
        "table": table, "all_rounds": rounds,
    }  # fmt: skip
    turns.tell(result, report(result), options.save)
    return 0 if len({entry["token_digest"] for entry in table.values()}) == 1 else 1


def report(result: dict) -> str:
    """The result as Markdown."""
    table, facts, starts = result["table"], result["corpus"], result["start_cpu"]
    megabytes = facts["text_bytes"] / 1e6
    base, digest = table[OURS]["cpu"], table[OURS]["token_digest"]
    rows = []
    for name, entry in table.items():
        net = entry["cpu"] - starts[name]
        rows.append([
            name, f"{megabytes / entry['wall']:.1f}", f"{megabytes / entry['cpu']:.2f}",
            f"{entry['token_bytes'] / 2e6 / entry['cpu']:.2f}", f"{entry['cpu']:.2f}", f"{starts[name]:.2f}",
            f"{megabytes / net:.2f}" if net > 0 else "-", f"{entry['peak_rss'] / 1e6:.0f}",
            f"{entry['cpu'] / base:.1f}x", "yes" if entry["token_digest"] == digest else "NO",
        ])  # fmt: skip
    headings = [
        "packer", "MB/s wall", "MB/CPU-s", "Mtok/CPU-s", "CPU s", "start CPU s", "net MB/CPU-s", "peak MB",
        "our speed-up", "same tokens",
    ]  # fmt: skip
    lines = [
        "# Packing: text to tokens",
        "",
        f"{megabytes:.1f} MB of distinct text, {facts['documents']} documents, vocabulary {result['vocab_size']}, "
        f"workers and cores: {result['workers']}, median of {result['rounds']} round(s), process start included.",
        "",
        turns.markdown(headings, rows),
        "",
    ]
    plain = table.get("plain encode_batch_fast")
    if plain:
        # A ratio needs both at the same time, on the same core.
        lines += [
            f"The bare calls of `encode_batch_fast` took {plain['encode_cpu']:.2f} CPU s "
            f"({megabytes / plain['encode_cpu']:.2f} MB/CPU-s); `bare.py` compares them with our engine.",
            "",
        ]
    lines += [f"Not measured: {name}: {reason}" for name, reason in result["missing"].items()]
    return "\n".join([*lines, *turns.origin(result), f"- corpus sha256: {facts['sha256']}"])


if __name__ == "__main__":
    if not hasattr(os, "wait4") or not shutil.which("git"):
        sys.exit("error: this bench needs Linux and git")
    sys.exit(main())
