"""``modalities run`` as a user calls it: SPEC. Writes the configuration file, runs it, and reads its metrics.jsonl.

Tokens per second are by the clock of the events, which the run's own measures are given beside.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

PARTS = ("forward", "backward", "optimizer")


def document(spec):
    """The configuration, as one writes it."""
    shape, options = spec["shape"], spec["options"]
    steps = spec["warmup"] + spec["steps"]
    model = {
        "component": "model.decoder", "vocab_size": shape["vocab_size"], "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"], "layers": shape["layers"], "heads": shape["heads"],
        "key_value_heads": shape["key_value_heads"], "sequence_length": shape["sequence_length"],
        "rope_theta": shape["rope_theta"], "initialization": {"component": "initialization.plain", "std": 0.02},
        **options.get("model", {}),
    }  # fmt: skip
    if "float8" in options:
        model = {"component": "precision.float8", "world": "${world}", "model": model, **options["float8"]}
    dataset = {
        "component": "dataset.packed", "path": spec["data"], "sequence_length": shape["sequence_length"]
    }  # fmt: skip
    return {
        "version": 1,
        "world": {"component": "world.auto"},
        "model": model,
        "trainer": {
            "component": "trainer.default", "world": "${world}", "steps": steps, "log_every": spec["log_every"],
            "clip_norm": 1.0,
            "executor": {
                "component": "executor.plain", "model": "${model}", "world": "${world}",
                "loss": {"component": "loss.cross_entropy", **options.get("loss", {})}, **options.get("executor", {}),
            },
            "optimizer": {
                "component": "optimizer.adamw", "model": "${model}", "lr": spec["lr"], **options.get("optimizer", {})
            },
            "schedule": {"component": "schedule.constant"},
            "batches": {
                "component": "batches.shuffled", "dataset": dataset, "world": "${world}",
                "samples_per_step": spec["samples_per_step"], "micro_batch_size": spec["micro_batch_size"],
            },
            "sinks": [{"component": "sink.console"}, {"component": "sink.jsonl"}],
        },
    }  # fmt: skip


def measures(records, spec):
    """What a run's records say about the steps that count."""
    started = next(record for record in records if record["event"] == "run_started")
    logged = {record["step"]: record for record in records if record["event"] == "step_logged"}
    first, begin, end = logged[1], logged[spec["warmup"]], logged[spec["warmup"] + spec["steps"]]
    tokens = end["tokens"] - begin["tokens"]
    seconds = end["time"] - begin["time"]
    counted = [record for step, record in logged.items() if step > spec["warmup"]]
    parts = {
        name: statistics.mean(record["seconds"][name] for record in counted)
        for name in counted[0]["seconds"]
        if all(name in record["seconds"] for record in counted)
    }
    found = {
        "tokens_per_second": tokens / seconds, "step_ms": 1e3 * seconds / spec["steps"],
        "first_step": first["time"] - started["time"], "first_loss": first["loss"], "last_loss": end["loss"],
        "tokens_per_step": tokens // spec["steps"], "parameters": started["parameters"],
        "said_tokens_per_second": statistics.mean(record["tokens_per_second"] for record in counted),
        "said_mfu": end["mfu"], "device_bytes": end["memory_bytes"] if spec["device"] == "cuda" else 0,
        "parts_ms": {name: 1e3 * value for name, value in parts.items()},
    }  # fmt: skip
    if "step" in parts and all(name in parts for name in PARTS):
        overhead = parts["step"] - sum(parts[name] for name in PARTS)
        found |= {"overhead_ms": 1e3 * overhead, "overhead_share": overhead / parts["step"]}
    return found


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(document(spec), sort_keys=False))
        command = [
            sys.executable, "-m", "modalities", "run", str(config), *spec["overrides"], "--folder", str(folder / "run")
        ]  # fmt: skip
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if run.returncode:
            sys.exit(run.stdout[-2000:])
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    chosen = [line for line in run.stdout.splitlines() if "executor" in line.lower() or "attention" in line.lower()]
    print(json.dumps({**measures([json.loads(line) for line in lines], spec), "said": chosen}))


if __name__ == "__main__":
    main()
