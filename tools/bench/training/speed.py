"""Training speed: `modalities run` and its peers on the same model, batch, precision and data shape, in turn.

    python tools/bench/training/speed.py --model cpu-20m --only plain --only hf --rounds 1
    python tools/bench/training/speed.py --nanochat ../nanochat --save benchmarks/results/training-cpu

Every trainer runs once a round, starting one further each round, as a process of its own; so does a measure of the
device's matrix products, the peak of MFU. Ratios are taken within rounds. Steps in which something is still compiled
do not count; the first step's time is given beside. ``models.py`` holds the models and our options.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import environments
import summary
import tokens
import turns
from environments import Made
from models import CASES, Case
from peers import DRIVERS, OURS, PEAK, Peer, peers, ready

TOKENS = {"cpu": 4_000_000, "cuda": 50_000_000}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modalities-bench"
    parser.add_argument("--cache", type=Path, default=default_cache, help="tokens and environments")
    parser.add_argument("--model", action="append", choices=CASES, help="(default: all of the device)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="that count (default: as models.py says)")
    parser.add_argument("--only", action="append", default=[], help="trainers whose name has this word; ours always")
    parser.add_argument("--without", action="append", default=[], help="not the trainers whose name has this word")
    parser.add_argument("--nanochat", type=Path, help="a copy of the nanochat repository")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE",
        help="override in our configuration, such as trainer.executor.compile=none",
    )  # fmt: skip
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="for each (default: all)")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one command")
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args(words)


def main() -> int:
    options = arguments()
    options.cache = options.cache.resolve()
    options.nanochat = options.nanochat.resolve() if options.nanochat else None
    names = options.model or [name for name, case in CASES.items() if case.device == options.device]
    result = saved(options.save)
    for name in names:
        case = CASES[name]
        if options.steps:
            case = dataclasses.replace(case, steps=options.steps)
        origin = {**turns.provenance(("--cache", "--nanochat", "--save")), "cores": options.cores}

        def keep(measured: dict, name: str = name, origin: dict = origin) -> None:
            result["models"][name] = {**origin, **measured, "load_behind": os.getloadavg()[0]}
            if options.save:
                turns.save(options.save, result, report(result))

        measure(case, options, keep)
    print(report(result))
    return 0


def saved(path: Path | None) -> dict:
    """What has been saved: models that are not measured now stay."""
    file = path.with_suffix(".json") if path else None
    return json.loads(file.read_text()) if file is not None and file.is_file() else {"models": {}}


def measure(case: Case, options: argparse.Namespace, keep: Callable[[dict], None]) -> None:
    """All trainers of one model, in turn; ``keep`` gets what there is after every round.

    A machine that is lent may be taken back.
    """
    known = {
        name: peer for name, peer in peers(case, options.nanochat, options.overrides).items() if wanted(name, options)
    }
    missing = {name: reason for name, reason in case.skip.items() if name in known}
    if options.nanochat is None:
        missing["nanochat"] = "give a copy of its repository with --nanochat PATH"
    made: dict[str, Made] = {}
    for name, peer in known.items():
        if name in missing:
            continue
        try:
            made[name] = ready(peer, options.cache)
        except environments.InstallError as error:
            missing[name] = str(error)
    data = tokens.make(options.cache, case.shape.vocab_size, TOKENS[case.device])
    versions = {name: found.versions for name, found in made.items()}
    sizes: dict[str, int] = {}
    rounds: dict[str, list[dict]] = {}

    def whole() -> None:
        count = min(len(found) for found in rounds.values())
        keep({
            "case": dataclasses.asdict(case), "figures": summary.figures(case, rounds), "rounds": count, "all": rounds,
            "missing": missing, "versions": versions,
        })  # fmt: skip

    with tempfile.TemporaryDirectory(dir=options.cache) as folder:
        scratch = Path(folder)

        def one(name: str, number: int) -> dict | None:
            try:
                if name == PEAK:
                    found = driven(Peer("matmul"), Made(sys.executable, {}), case, data, scratch, PEAK, options)
                    rounds.setdefault(name, []).append(found)
                    return found
                found = fitting(known[name], made[name], case, data, scratch, name, options, sizes)
            except (turns.RunError, ValueError, IndexError) as error:
                if name in (OURS, PEAK):
                    raise SystemExit(f"error: {name}: {error}") from None
                missing[name] = str(error)[-300:]
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                return None
            found["differences"] = summary.differences(case, found, known[name].same_model)
            rate = f"{found['tokens_per_second']:,.0f} tokens/s"
            print(f"round {number + 1}, {name}: {rate} {found['differences'] or ''}", file=sys.stderr, flush=True)
            rounds.setdefault(name, []).append(found)
            return found

        for number in range(options.rounds):
            names = [name for name in (PEAK, *made) if name not in missing]
            first = number % len(names)
            for name in names[first:] + names[:first]:
                one(name, number)
            whole()


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether to run this trainer: ours always."""
    if name == OURS:
        return True
    chosen = not options.only or any(word in name for word in options.only)
    return chosen and not any(word in name for word in options.without)


def fitting(
    peer: Peer, made: Made, case: Case, data: Path, scratch: Path, name: str, options: argparse.Namespace,
    sizes: dict[str, int],
) -> dict:  # fmt: skip
    """Run with the largest micro batch that fits; which one that is is found in the first round."""
    for size in (sizes[name],) if name in sizes else case.micro_batch_size:
        try:
            found = driven(peer, made, case, data, scratch, name, options, size)
        except turns.RunError as error:
            if "out of memory" not in str(error).lower() or size == case.micro_batch_size[-1]:
                raise
            continue
        sizes[name] = size
        return {**found, "micro_batch_size": size}
    raise AssertionError("a case has a micro batch size")


def driven(
    peer: Peer, made: Made, case: Case, data: Path, scratch: Path, name: str, options: argparse.Namespace,
    micro_batch_size: int = 1,
) -> dict:  # fmt: skip
    """Run a driver; the line of JSON it ends with, and the peak of its memory."""
    file = scratch / "spec.json"
    file.write_text(json.dumps({
        "shape": dataclasses.asdict(case.shape), "device": case.device, "data": str(data), "lr": case.lr,
        "dtype": "<u2" if case.shape.vocab_size < tokens.SMALL_VOCABULARY else "<i4", "warmup": case.warmup,
        "steps": case.steps, "log_every": case.warmup, "samples_per_step": case.samples_per_step,
        "micro_batch_size": micro_batch_size, "weights": case.weights, **peer.spec,
    }))  # fmt: skip
    # What a compiler keeps is shared by the rounds of one trainer only, so that everyone's first round is cold.
    compiled = scratch / "".join(letter if letter.isalnum() else "-" for letter in name)
    variables = {
        **made.variables(), "OMP_NUM_THREADS": str(options.cores), "TORCHINDUCTOR_CACHE_DIR": str(compiled),
    }  # fmt: skip
    command = [made.python, str(DRIVERS / f"{peer.driver}.py"), str(file)]
    usage = turns.run([command], cores=options.cores, timeout=options.timeout, environment=variables)
    # Some libraries say more at their end.
    told = [line for line in usage.output.splitlines() if line.startswith("{")]
    return {**json.loads(told[-1]), "peak_rss": usage.peak_rss}


def report(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        "# Training: tokens per second", "",
        "Each trainer in turn, on the same cores. A ratio is our tokens per second over the peer's within one round, "
        "so above 1 we are faster; given are median, least and most. MFU is by the peer's own FLOPs (PaLM's "
        "convention; causal counts half of the attention) over the peak of the data sheet or, on a CPU, of the fastest "
        "bf16 matrix products of all rounds. The first step, compilation included, is that of the first round.", "",
    ]  # fmt: skip
    for name, measured in result["models"].items():
        lines += [*summary.report(name, measured), *turns.origin(measured), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    if not hasattr(os, "wait4"):
        sys.exit("error: this bench needs Linux")
    sys.exit(main())
