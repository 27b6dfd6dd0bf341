"""The shipped JSON Schema is the one of today's components."""

from __future__ import annotations

import json
from pathlib import Path

from modalities_cli.wiring import run_roots
from modalities_core.config.schema import json_schema
from modalities_core.registry import Registry, registry

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "packages" / "modalities-cli" / "src" / "modalities_cli" / "schema.json"


def test_the_shipped_schema_is_fresh() -> None:
    ours = Registry()
    for entry in registry():
        if isinstance(entry.target, str) and entry.target.startswith("modalities_") and "example" not in entry.target:
            ours.add(entry.name, entry.target, entry.distribution)
    fresh = json.loads(json.dumps(json_schema(ours, run_roots())))
    assert json.loads(SHIPPED.read_text()) == fresh, f"modalities schema --out {SHIPPED.relative_to(ROOT)}"
