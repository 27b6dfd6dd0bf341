"""``chat``: conversations to tokens and a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from modalities_data.commands.group import PATH, as_json_option, data, end_option, overwrite_option
from modalities_data.terminal import accounted, amount, packing_progress, rates, say, summarize


@data.command()
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True)
@click.argument("output", type=PATH)
@click.option("--tokenizer", required=True, type=PATH, help="A tokenizer.json, or a folder with one.")
@click.option("--template", type=PATH,
              help="A Jinja file or a tokenizer_config.json; by default what lies beside the tokenizer.")  # fmt: skip
@end_option
@click.option("--key", default="messages", show_default=True, help="The JSON key that holds the list of messages.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
              help="What to do with a line that is no conversation.")  # fmt: skip
@click.option("--only", type=click.Choice(["train", "held-out"]), help="Write one side of a split, not all.")
@click.option("--fraction", default=0.01, show_default=True, help="How much a split holds out.")
@click.option("--seed", default=0, show_default=True, help="Chooses another split.")
@overwrite_option
@as_json_option
def chat(
    sources: tuple[str, ...], output: Path, tokenizer: Path, template: Path | None, end_of_document: str, key: str,
    on_error: Literal["fail", "skip"], only: Literal["train", "held-out"] | None, fraction: float, seed: int,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write the conversations of INPUT..., JSONL files, into the packed folder OUTPUT.

    A line holds {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The
    folder's mask counts what the assistant says, and nothing else.

    \b
    Example: modalities-data chat conversations.jsonl chats --tokenizer model/tokenizer.json
    Example: a training set and a held-out set, from a folder with tokenizer.json and chat_template.jinja
      modalities-data chat conversations.jsonl train --tokenizer model --only train
      modalities-data chat conversations.jsonl held-out --tokenizer model --only held-out
    """
    from modalities_data.prepare.chat import Side, pack_chat
    from modalities_data.prepare.chat_template import CONFIG_NAME, read_template
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    chosen = read_template(template or folder, folder / CONFIG_NAME)
    ids = HuggingFaceTokenizer(tokenizer, end_of_document, "tokenizers")
    with packing_progress() as progress:
        report = pack_chat(sources, output, ids, chosen, on_error=on_error, overwrite=overwrite, key=key,
                           side=Side(only, fraction, seed) if only else None, on_progress=progress)  # fmt: skip
    made, counts = report.manifest, report.manifest.accounting
    cut = f"; {report.cut_tokens} tokens lie across the border of a turn and do not count" if report.cut_tokens else ""
    say(
        f"{output}: {accounted(counts, 'conversations', f'{output}/conversations.rejected.jsonl')}; "
        f"{amount(made.tokens, 'tokens')}, {report.counted_tokens / made.tokens:.0%} of them the assistant's{cut}; "
        f"{rates(report.seconds, report.bytes_read, made.tokens)}",
        as_json,
    )
    summary = {
        "output": str(output), "tokens": made.tokens, "counted_tokens": report.counted_tokens,
        "cut_tokens": report.cut_tokens, "shards": len(made.shards), "documents": counts.documents,
        "written": counts.written, "skipped": counts.skipped, "failed": counts.failed,
        "seconds": round(report.seconds, 3), "bytes_read": report.bytes_read, "fingerprint": made.fingerprint,
    }  # fmt: skip
    summarize(summary, as_json)
