"""Packed tokens to samples: modalities-data and its peers on the same tokens, in turn, each pinned to one core.

    python tools/bench/data/load.py --tokens 20_000_000 --rounds 1
    python tools/bench/data/load.py --megatron ../Megatron-LM --save benchmarks/results/data-load

Measures random samples per CPU second, start-up and memory at 10^9 samples (sparse files), finding the lines of a JSONL
file beside the machine's memory bandwidth, and planning best-fit packing. Each peer takes turns with us alone, and is
compared with what we did beside it, as the same integers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import environments
import host
import token_folders
import turns
from environments import Environment, Made
from packers import DATATROVE, DRIVERS, MEGATRON, ORIGINAL, ours

OURS = "modalities-data"
LITDATA = Environment("litdata", (("torch==2.13.0", "torchvision", "litdata"),), ("litdata", "torch"))
# Its dataset is a torch dataset.
DATATROVE_TORCH = replace(
    DATATROVE, name="datatrove-torch", steps=(("torch==2.13.0",), *DATATROVE.steps), shows=("datatrove", "torch")
)
MEMORY_LIMIT = 8 << 30
"""Of private memory, for opening: what is larger than that is said to be so, rather than taking the machine down."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modalities-bench"
    parser.add_argument("--cache", type=Path, default=default_cache, help="tokens and environments")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="to read samples from (default: 200 million)")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10**9, help="of the sparse folders (default: 10^9)")
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 4096, 16000], help="of our sparse folders")
    parser.add_argument("--documents", type=int, default=10**8, help="to plan best-fit packing for (default: 10^8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron", type=Path, help="a copy of the Megatron-LM repository")
    parser.add_argument("--only", action="append", default=[], help="peers whose name has this word")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one command")
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args()


Command = Callable[[Made, Path, str], list[str]]
"""From environment, folder of tokens and what to do, ``samples`` or ``open``, to a command."""


def loaders(length: int, megatron: Path | None) -> dict[str, tuple[Environment | None, Command]]:
    """Every loader: its environment (None is ours) and its command."""

    def driver(name: str, path: str) -> Command:
        return lambda made, folder, what: [
            made.python, str(DRIVERS / f"{name}.py"), str(folder / path), str(length), what
        ]  # fmt: skip

    found: dict[str, tuple[Environment | None, Command]] = {
        OURS: (None, driver("load_ours", "packed")),
        "original modalities 0.5.0": (ORIGINAL, driver("load_original", "tokens.pbin")),
        "datatrove": (DATATROVE_TORCH, driver("load_datatrove", "datatrove")),
        "litdata": (LITDATA, driver("load_litdata", "packed/00000.bin")),
    }
    if megatron is not None:
        found["Megatron-LM"] = (MEGATRON, lambda made, folder, what: [
            made.python, str(DRIVERS / "run_in_megatron.py"), str(megatron), str(DRIVERS / "load_megatron.py"),
            str(megatron), str(folder / "packed" / "00000"), str(length), str(folder / "megatron"),
        ])  # fmt: skip
    return found


def asked(command: list[str], made: Made, timeout: float, memory_limit: int | None = None) -> dict:
    """Run a driver on one core; the line of JSON it ends with, and the peak of its memory."""
    usage = turns.run(
        [command], cores=1, timeout=timeout, environment=made.variables(), memory_limit=memory_limit
    )  # fmt: skip
    return {**json.loads(usage.output.strip().splitlines()[-1]), "peak_rss": usage.peak_rss}


def main() -> int:
    options = arguments()
    options.cache = options.cache.resolve()
    megatron = options.megatron.resolve() if options.megatron else None
    known = loaders(options.sequence_length, megatron)
    chosen = {name: known[name] for name in known if name == OURS or not options.only or _named(name, options.only)}
    missing = {} if megatron else {"Megatron-LM": "skipped: give a copy of its repository with --megatron PATH"}
    ready: dict[str, Made] = {}
    for name, (environment, _) in chosen.items():
        try:
            ready[name] = environments.make(options.cache, environment) if environment else ours()
        except environments.InstallError as error:
            missing[name] = str(error)
    pairs = read_samples(options, chosen, ready, missing)
    result = {
        **turns.provenance(("--cache", "--megatron", "--save")), "tokens": options.tokens,
        "sequence_length": options.sequence_length, "rounds": options.rounds,
        "versions": {name: made.versions for name, made in ready.items()}, **compared(pairs), "pairs": pairs,
        "opening": open_sparse(options, chosen, ready), "host": host.figures(options.cache, options.documents),
        "missing": missing,
    }  # fmt: skip
    turns.tell(result, report(result), options.save)
    return 0


def _named(name: str, words: list[str]) -> bool:
    return any(word in name for word in words)


def read_samples(options: argparse.Namespace, chosen: dict, ready: dict[str, Made], missing: dict) -> dict:
    """Samples per CPU second of every loader and way of reading, with ours right before or after it.

    Each is checked to read what is in the file.

    Returns:
        For every peer, and for ours where there is none, its rounds: ``{loader: {way: rate}}`` of both.
    """
    folder = options.cache / f"tokens-{options.tokens}"
    tokens = token_folders.make(folder, options.tokens)

    def one(name: str) -> dict:
        found = asked(chosen[name][1](ready[name], folder, "samples"), ready[name], options.timeout)
        start = 7 * found["stride"]
        if found["first"] not in (None, tokens[start : start + 8].tolist()):
            raise SystemExit(f"error: {name} reads {found['first']} as sample 7, the file has other tokens there")
        shown = {way: f"{rate / 1e3:,.1f}" for way, rate in found["rates"].items()}
        print(f"{name}, thousand samples/s: {shown}", file=sys.stderr, flush=True)
        return found["rates"]

    def pair(name: str, number: int) -> dict | None:
        found: dict[str, dict] = {}
        # Who goes first changes, so that neither always has the warmer machine.
        for loader in sorted({name, OURS}, key=lambda loader: (loader == OURS) == bool(number % 2)):
            try:
                found[loader] = one(loader)
            except (turns.RunError, ValueError, IndexError) as error:
                if loader == OURS:
                    raise SystemExit(f"error: {loader}: {error}") from None
                missing[loader] = str(error)
                print(f"{loader}: {error}", file=sys.stderr, flush=True)
                return None
        return found

    peers = [name for name in ready if name != OURS]
    found = turns.in_turn(peers, options.rounds, pair)
    return found or turns.in_turn([OURS], options.rounds, pair)


def like(way: str, ours: dict) -> str:
    """Which of our ways gives the same as a peer's ``way``: its integers, tensors, or documents beside them."""
    documents = ", with documents" if "masks" in way or "positions" in way else ""
    found = (
        "tensors of its loader" if "tensors" in way else f"{'int32' if 'int32' in way else 'int64'} batch"
    ) + documents
    return found if found in ours else "int64 batch"


def compared(pairs: dict) -> dict:
    """Medians over all rounds, and of the ratios within each pair."""
    mine = [entry[OURS] for rounds in pairs.values() for entry in rounds]
    rates, ratios = {OURS: turns.medians(mine)}, {}
    for name, rounds in pairs.items():
        if name == OURS:
            continue
        rates[name] = turns.medians([entry[name] for entry in rounds])
        ratios[name] = {
            way: statistics.median(entry[OURS][like(way, entry[OURS])] / entry[name][way] for entry in rounds)
            for way in rates[name]
        }
    return {"rates": rates, "ratios": ratios}


def open_sparse(options: argparse.Namespace, chosen: dict, ready: dict[str, Made]) -> dict:
    """What it takes until the first sample of a shuffled order, at a hundredth of the samples and at all of them."""
    found: dict[str, dict] = {}
    jobs = [(samples, shards) for shards in options.shards for samples in (options.samples // 100, options.samples)]
    for number, (samples, shards) in enumerate(jobs):
        with tempfile.TemporaryDirectory(dir=options.cache) as name:
            folder = Path(name)
            token_folders.make_sparse(folder, samples * options.sequence_length + 1, shards)
            # The others' files are the same whatever our shards are.
            for loader in (OURS, "original modalities 0.5.0", "datatrove") if number < 2 else (OURS,):
                if loader not in ready:
                    continue
                made = ready[loader]
                command = chosen[loader][1](made, folder, "open")
                try:
                    rounds = [asked(command, made, options.timeout, MEMORY_LIMIT) for _ in range(options.rounds)]
                    entry = turns.medians(rounds)
                except turns.RunError as error:
                    entry = {"failed": str(error)}
                of = f"{samples:.0e} in {shards} shards" if loader == OURS else f"{samples:.0e}"
                found.setdefault(loader, {})[of] = entry
    return found


def report(result: dict) -> str:
    """The result as Markdown."""
    mine, ratios = result["rates"][OURS], result["ratios"]
    rows = [
        [name, way, f"{rate / 1e3:,.1f}", f"{1e6 / rate:,.2f}",
         *((like(way, mine), f"{ratios[name][way]:,.1f}x") if name in ratios else ("", ""))]
        for name, found in result["rates"].items()
        for way, rate in found.items()
    ]  # fmt: skip
    lines = [
        "# Loading: packed tokens to samples", "",
        f"Random samples of {result['sequence_length'] + 1} tokens from {result['tokens'] / 1e6:.0f} M tokens in the "
        "page cache, one core, in batches of 32 where not said otherwise, per CPU second. Medians of "
        f"{result['rounds']} round(s); a ratio is of two runs one after the other.", "",
        turns.markdown(["loader", "as", "thousand samples/s", "us/sample", "beside our", "ours is"], rows), "",
    ]  # fmt: skip
    best = [(*min(found.items(), key=lambda entry: entry[1]), name) for name, found in ratios.items()]
    if best:
        way, ratio, name = min(best, key=lambda entry: entry[1])
        lines += [f"Nearest to us is {name} with {way}: ours is {ratio:.1f} times as fast.", ""]
    lines += [
        "## Opening",
        "",
        "Until the first sample of the shuffled order, on sparse files; by the clock. Import is Python's.",
        "",
    ]
    rows = []
    for name, sizes in result["opening"].items():
        for samples, entry in sizes.items():
            if "failed" in entry:
                rows.append([name, samples, "-", "-", "-", f"failed: {entry['failed'][-100:]}"])
            else:
                times = [f"{entry[key]:.3f}" for key in ("import", "open", "seek")]
                rows.append([name, samples, *times, f"{entry['peak_rss'] / 1e6:,.0f}"])
    lines += [turns.markdown(["loader", "samples", "import s", "open s", "first sample s", "peak MB"], rows), ""]
    lines += host.report(result["host"])
    lines += [f"Not measured: {name}: {reason}" for name, reason in result["missing"].items()]
    return "\n".join([*lines, *turns.origin(result)])


if __name__ == "__main__":
    if not hasattr(os, "wait4") or not shutil.which("git"):
        sys.exit("error: this bench needs Linux and git")
    sys.exit(main())
