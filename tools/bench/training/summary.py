"""From the rounds to figures: rates, ratios within rounds, shares of the peak, and whether all did the same work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import turns
from models import Case, Shape
from peers import OURS, PEAK

Rounds = Mapping[str, Sequence[Mapping]]
FIRST_LOSS_TOLERANCE = 0.3
"""Nats between the first loss and ln V: logits of a new model are small, not zero."""


def figures(case: Case, rounds: Rounds) -> dict[str, dict]:
    """Medians over rounds by name; ratios are taken within each round first.

    Args:
        case: what was trained.
        rounds: by name, one entry per round in order; ``matmul`` gives the peak.
    """
    measured, sheet = peaks(rounds)
    found = {}
    for name, entries in rounds.items():
        if name == PEAK:
            continue
        flops = entries[0].get("flops_per_token", case.shape.flops_per_token)
        causal = entries[0].get("causal_flops_per_token", case.shape.causal_flops_per_token)
        rate = statistics.median(entry["tokens_per_second"] for entry in entries)
        found[name] = {
            **turns.medians(entries), "mfu": flops * rate / (sheet or measured),
            "causal_mfu": causal * rate / (sheet or measured), "of_measured": flops * rate / measured,
            "first_step_cold": entries[0]["first_step"], "ratio": ratio(rounds, name),
        }  # fmt: skip
    return found


def peaks(rounds: Rounds) -> tuple[float, float | None]:
    """FLOP/s of the fastest products of all rounds, which no busy moment flatters, and of a GPU's data sheet."""
    return max(entry["flops"] for entry in rounds[PEAK]), rounds[PEAK][0].get("sheet")


def ratio(rounds: Rounds, name: str) -> dict[str, float]:
    """How many times as fast we are as ``name``: median, least and most over the rounds that both have."""
    if OURS not in rounds:
        return {}
    pairs = zip(rounds[OURS], rounds[name], strict=False)
    all_ratios = [mine["tokens_per_second"] / other["tokens_per_second"] for mine, other in pairs]
    return {"median": statistics.median(all_ratios), "least": min(all_ratios), "most": max(all_ratios)}


def differences(case: Case, entry: Mapping, same_model: bool) -> list[str]:
    """What of an entry is not the work that was asked for; nothing where it is."""
    found = []
    expected = math.log(case.shape.vocab_size)
    if abs(entry["first_loss"] - expected) > FIRST_LOSS_TOLERANCE:
        found.append(f"the first loss is {entry['first_loss']:.2f}, ln V is {expected:.2f}")
    if not entry["last_loss"] < entry["first_loss"]:
        found.append(f"the loss went from {entry['first_loss']:.2f} to {entry['last_loss']:.2f}")
    tokens = case.samples_per_step * case.shape.sequence_length
    if entry["tokens_per_step"] != tokens:
        found.append(f"{entry['tokens_per_step']} tokens per step, not {tokens}")
    kind = "parameters" if same_model else "matmul_parameters"
    wanted = getattr(case.shape, kind)
    if abs(entry[kind] - wanted) > 0.01 * wanted:
        found.append(f"{entry[kind]:,} {kind.replace('_', ' ')}, not {wanted:,}")
    return found


def report(name: str, result: Mapping) -> list[str]:
    """Lines of Markdown about one model, as it was saved."""
    case = Case(**{**result["case"], "shape": Shape(**result["case"]["shape"])})
    shape, found = case.shape, result["figures"]
    rows = []
    for peer, entry in found.items():
        ratios = entry["ratio"]
        beside = (f"{ratios['median']:.2f}x", f"{ratios['least']:.2f} to {ratios['most']:.2f}") if ratios else ("", "")
        rows.append([
            peer, f"{entry['tokens_per_second']:,.0f}", f"{entry['step_ms']:,.1f}", f"{entry['mfu']:.1%}",
            f"{entry['causal_mfu']:.1%}", f"{entry['of_measured']:.1%}", *beside, f"{entry['first_step_cold']:.1f}",
            f"{max(entry['device_bytes'], 0) / 1e9 or entry['peak_rss'] / 1e9:.2f}",
        ])  # fmt: skip
    headings = [
        "trainer", "tokens/s", "step ms", "MFU", "causal MFU", "of products", "ours is", "all rounds", "first step s",
        "peak GB",
    ]  # fmt: skip
    measured, sheet = peaks(result["all"])
    peak = f"bf16 matrix products reach {measured / 1e9:,.0f} GFLOP/s beside"
    if single := [entry["fp32_flops"] for entry in result["all"][PEAK] if "fp32_flops" in entry]:
        peak += f", fp32 ones {max(single) / 1e9:,.0f}"
    peak += f", the data sheet says {sheet / 1e9:,.0f}" if sheet else ""
    lines = [
        f"## {name}", "",
        f"{shape.parameters / 1e6:,.1f} M parameters: vocabulary {shape.vocab_size}, hidden {shape.hidden_size}, "
        f"{shape.layers} layers, {shape.heads} heads, intermediate {shape.intermediate_size}, sequence "
        f"{shape.sequence_length}; {case.samples_per_step} samples a step; {case.warmup} steps before and "
        f"{case.steps} that count, {result['rounds']} round(s) on {result['cores']} core(s); {peak}.", "",
        turns.markdown(headings, rows), "",
    ]  # fmt: skip
    lines += _parts(found)
    lines += _work(found)
    lines += [f"Not measured: {peer}: {reason}" for peer, reason in result["missing"].items()]
    return [*lines, ""]


def _parts(found: Mapping[str, Mapping]) -> list[str]:
    """Where our time goes, as the run itself says."""
    rows = []
    for peer, entry in found.items():
        if "parts_ms" not in entry:
            continue
        parts = entry["parts_ms"]
        overhead = "-"
        if "overhead_ms" in entry:
            overhead = f"{entry['overhead_ms']:.2f} ({entry['overhead_share']:.2%})"
        cells = [f"{parts[key]:.2f}" if key in parts else "-" for key in _PARTS]
        said = "-" if entry["said_mfu"] is None else f"{entry['said_mfu']:.1%}"
        rows.append([peer, *cells, overhead, f"{entry['said_tokens_per_second']:,.0f}", said])
    if not rows:
        return []
    headings = ["ms per step", *_PARTS, "overhead", "its own tokens/s", "its own MFU"]
    text = "Our own measures; overhead is the step without forward, backward and optimizer."
    return [text, "", turns.markdown(headings, rows), ""]


_PARTS = ("step", "data", "forward", "backward", "optimizer", "other")


def _work(found: Mapping[str, Mapping]) -> list[str]:
    rows = [
        [peer, f"{entry['parameters']:,}", entry["tokens_per_step"], f"{entry['first_loss']:.3f}",
         f"{entry['last_loss']:.3f}", "; ".join(entry["differences"]) or "yes"]
        for peer, entry in found.items()
    ]  # fmt: skip
    headings = ["trainer", "parameters", "tokens/step", "first loss", "last loss", "the same work"]
    return [turns.markdown(headings, rows), ""]
