"""``filter``: the documents that pass every rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from modalities_data.commands.group import PATH, as_json_option, data, end_option, key_option, overwrite_option
from modalities_data.terminal import packing_progress, say, summarize


@data.command("filter")
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output", type=PATH)
@click.option("--min-tokens", type=click.IntRange(0), help="Fewer tokens are refused; the end does not count.")
@click.option("--max-tokens", type=click.IntRange(0), help="More tokens are refused; the end does not count.")
@click.option("--contains", metavar="TEXT", multiple=True, help="Keep documents with this text; may be repeated.")
@click.option("--not-contains", metavar="TEXT", multiple=True, help="Refuse documents with this text; may be repeated.")
@click.option("--key-equals", metavar="KEY=VALUE", multiple=True,
              help="Keep lines whose field is VALUE, text or JSON; a.b reaches into objects.")  # fmt: skip
@click.option("--predicate", metavar="NAME", multiple=True,
              help="A function that a package registered under modalities.predicates.")  # fmt: skip
@click.option("--tokenizer", metavar="PATH|bytes", help="Counts the tokens of documents in files.")
@end_option
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="What to do with a line that is no document.")  # fmt: skip
@key_option
@overwrite_option
@as_json_option
def filter_command(
    sources: tuple[str, ...], output: Path, tokenizer: str | None, end_of_document: str,
    on_error: Literal["fail", "skip"], key: str, overwrite: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Write the documents of a packed folder, or of files with text, that pass every rule to OUTPUT.

    Files are what `pack` reads; then OUTPUT is a JSONL file, with the lines as they were. A refused document is
    counted under the first rule that refuses it, in the order of these options.

    \b
    Example: modalities-data filter corpus.jsonl english.jsonl --key-equals lang=en --not-contains lorem
    """
    from modalities_data.prepare.filter import filter_documents
    from modalities_data.tokenizers.opening import named_tokenizer

    rules = _rules(options)
    counting = named_tokenizer(tokenizer, end_of_document) if tokenizer else None
    told = {name: value for name, value in options.items() if value not in (None, ())}
    with packing_progress("filtering") as progress:
        made = filter_documents(
            sources[0] if len(sources) == 1 else sources, output, rules, key=key, tokenizer=counting,
            on_error=on_error, options=told, overwrite=overwrite, on_progress=progress,
        )  # fmt: skip
    counts = made.accounting
    refused = "".join(f", {count} refused by {rule}" for rule, count in counts.skipped.items())
    failed = f", {counts.failed} failed" if counts.failed else ""
    say(f"{output}: {counts.written} of {counts.documents} documents{refused}{failed}", as_json)
    summary = {"output": str(output), "documents": counts.documents, "written": counts.written,
               "skipped": counts.skipped, "failed": counts.failed}  # fmt: skip
    summarize(summary, as_json)


def _rules(options: dict[str, Any]) -> dict[str, Any]:
    """The predicates that the options ask for, by the name of their rule."""
    from modalities_data.prepare import filter as predicates

    rules: dict[str, Any] = {}
    for name in ("min_tokens", "max_tokens", "contains", "not_contains"):
        if options[name] not in (None, ()):
            rules[name] = getattr(predicates, name)(options[name])
    for pair in options["key_equals"]:
        field, equals, value = pair.partition("=")
        if not (field and equals):
            raise click.BadParameter(f"{pair!r} is not like KEY=VALUE", param_hint="--key-equals")
        rules[f"key_equals {pair}"] = predicates.key_equals(field, value)
    for name in options["predicate"]:
        rules[f"predicate {name}"] = predicates.registered(name)
    return rules
