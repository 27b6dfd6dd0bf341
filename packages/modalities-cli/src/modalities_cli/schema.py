"""``modalities schema``: the language, for editors."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.  [default: stdout]")
def schema(out: Path | None) -> None:
    """Print the JSON Schema of the language, components of installed plugins included.

    Name it in the first line of a document, and an editor completes keys and shows help:
    # yaml-language-server: $schema=schema.json

    \b
    Example:
        modalities schema --out schema.json
    """
    import json

    from modalities_cli.wiring import run_roots
    from modalities_core.config.schema import json_schema
    from modalities_core.files import write_text
    from modalities_core.registry import registry

    text = json.dumps(json_schema(registry(), run_roots()), indent=1) + "\n"
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(out, text)
