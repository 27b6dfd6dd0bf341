"""Our whole packing with the ``tokenizers`` engine beside the bare calls of ``encode_batch_fast``, in CPU seconds.

    python tools/bench/data/bare.py --megabytes 10
    python tools/bench/data/bare.py --save benchmarks/results/data-bare

Both run at the same time on the same core, so that other work and a changing clock slow them alike: one after the other
they differ by a fifth from minute to minute on a shared machine, here by a few hundredths. Ours counts from the start
of the process to its end; of the bare calls nothing counts but the calls, and letting go of what they gave.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import environments
import turns
from corpus import stretched
from pack import measured, trained_tokenizer
from packers import PLAIN, ours, packers

OURS, BARE = "modalities (tokenizers)", "plain encode_batch_fast"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modalities-bench"
    parser.add_argument("--cache", type=Path, default=default_cache, help="corpus, tokenizer and environment")
    parser.add_argument("--megabytes", type=int, default=100, help="of distinct text (default: 100)")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one command")
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.cache, options.workers = options.cache.resolve(), 1
    known = packers(None)
    made = {OURS: ours(), BARE: environments.make(options.cache, PLAIN)}
    corpus, facts = stretched(options.cache, options.megabytes)
    tokenizer = trained_tokenizer(options.cache, corpus, options.vocab_size)

    def one(name: str) -> dict:
        usage, tokens = measured(known[name], made[name], corpus, tokenizer, options)
        calls = json.loads(usage.output.strip().splitlines()[-1])["encode_cpu"] if name == BARE else None
        return {"cpu": usage.cpu, "calls_cpu": calls, "peak_rss": usage.peak_rss, **tokens}

    rounds = []
    for number in range(options.rounds):
        with ThreadPoolExecutor(2) as threads:
            rounds.append(dict(zip(made, threads.map(one, made), strict=True)))
        cpu, calls = rounds[-1][OURS]["cpu"], rounds[-1][BARE]["calls_cpu"]
        print(f"round {number + 1}: ours {cpu:.2f} CPU s, the calls {calls:.2f}", file=sys.stderr, flush=True)
    result = {
        **turns.provenance(("--cache", "--save")), "versions": {name: tools.versions for name, tools in made.items()},
        "corpus": facts, "vocab_size": options.vocab_size, "rounds": rounds,
    }  # fmt: skip
    turns.tell(result, report(result), options.save)
    return 0 if len({entry["token_digest"] for found in rounds for entry in found.values()}) == 1 else 1


def report(result: dict) -> str:
    """The result as Markdown."""
    facts, rounds = result["corpus"], result["rounds"]
    shares = [found[BARE]["calls_cpu"] / found[OURS]["cpu"] for found in rounds]
    equal = len({entry["token_digest"] for found in rounds for entry in found.values()}) == 1
    rows = [
        [number, f"{found[OURS]['cpu']:.2f}", f"{found[BARE]['calls_cpu']:.2f}", f"{found[BARE]['cpu']:.2f}",
         f"{100 * share:.1f} %", f"{found[OURS]['peak_rss'] / 1e6:.0f}"]
        for number, (found, share) in enumerate(zip(rounds, shares, strict=True), 1)
    ]  # fmt: skip
    headings = ["round", "our command, CPU s", "bare calls, CPU s", "their command, CPU s", "share", "our peak MB"]
    return "\n".join([
        "# Packing beside bare calls of the tokenizers library", "",
        f"{facts['text_bytes'] / 1e6:.1f} MB of text, {facts['documents']} documents, vocabulary "
        f"{result['vocab_size']}, both at the same time on one core. Our whole command, process start included, runs "
        f"at {100 * statistics.median(shares):.0f} % of the speed of the bare calls per CPU second"
        f"{'' if equal else ', but THE TOKENS DIFFER'}.", "",
        turns.markdown(headings, rows), *turns.origin(result),
    ])  # fmt: skip


if __name__ == "__main__":
    if not hasattr(os, "wait4") or not shutil.which("git"):
        sys.exit("error: this bench needs Linux and git")
    sys.exit(main())
