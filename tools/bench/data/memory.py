"""Peak memory of packing, on a corpus and on one ten times as large: it should be the same.

    python tools/bench/data/memory.py --megabytes 10
    python tools/bench/data/memory.py --save benchmarks/results/data-memory

The number is of the whole process tree: the largest sum over its processes that was seen, or the largest peak of one
process if that is more. One worker packs in the command's own process, so there it is that process's own peak.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import turns
from corpus import stretched
from pack import measured, trained_tokenizer
from packers import ours, packers

TIMES = (1, 10)
ENGINES = ("fastokens", "tokenizers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modalities-bench"
    parser.add_argument("--cache", type=Path, default=default_cache, help="corpora and tokenizer")
    parser.add_argument("--megabytes", type=int, default=100, help="of the smaller corpus (default: 100)")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes, and cores to run on")
    parser.add_argument("--only", choices=ENGINES, help="one engine")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one command")
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.cache = options.cache.resolve()
    known, made = packers(None), ours()
    corpora = {times: stretched(options.cache, options.megabytes * times) for times in TIMES}
    tokenizer = trained_tokenizer(options.cache, corpora[1][0], options.vocab_size)
    peaks: dict[str, dict[str, int]] = {}
    for engine in [options.only] if options.only else ENGINES:
        for times, (source, _) in corpora.items():
            usage, _ = measured(known[f"modalities ({engine})"], made, source, tokenizer, options)
            peaks.setdefault(engine, {})[str(times)] = usage.peak_rss
            print(f"{engine}, {times}x: {usage.peak_rss / 1e6:.0f} MB, {usage.cpu:.1f} CPU s", file=sys.stderr)
    result = {
        **turns.provenance(("--cache", "--save")), "versions": made.versions, "workers": options.workers,
        "corpora": {str(times): facts for times, (_, facts) in corpora.items()}, "peak_rss": peaks,
    }  # fmt: skip
    turns.tell(result, report(result), options.save)
    return 0


def report(result: dict) -> str:
    """The result as Markdown."""
    sizes = {times: f"{facts['text_bytes'] / 1e6:,.0f} MB" for times, facts in result["corpora"].items()}
    rows = [[engine, *(f"{found[times] / 1e6:.0f}" for times in sizes)] for engine, found in result["peak_rss"].items()]
    mixed = [
        f", {facts['mixed_documents']} of its {facts['documents']} documents lines of others in another order"
        for facts in result["corpora"].values()
        if facts["mixed_documents"]
    ]
    return "\n".join([
        "# Packing: peak memory", "",
        f"Of the whole process tree, workers: {result['workers']}, in MB, by text packed. The larger corpus is ten "
        f"times the smaller{''.join(mixed)}.", "",
        turns.markdown(["engine", *sizes.values()], rows), *turns.origin(result),
    ])  # fmt: skip


if __name__ == "__main__":
    if not hasattr(os, "wait4") or not shutil.which("git"):
        sys.exit("error: this bench needs Linux and git")
    sys.exit(main())
