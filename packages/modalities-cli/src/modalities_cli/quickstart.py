"""``modalities quickstart``: from the text on this machine to a model that writes, with one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modalities_core.progress import Progress

CONFIG = Path(__file__).parent / "quickstart.yaml"
VOCAB_SIZE = 2048
HELD_OUT_FRACTION = 0.005
PROMPTS = (
    "import os\n\n\ndef read_",
    "class Reader:\n    def __init__(self",
    "class TestParser(unittest.TestCase):\n    def test_",
)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Train this many steps.  [default: as the document says]")
@click.option("--fresh", is_flag=True, help="Train again from the start.")
def quickstart(folder: Path, steps: int | None, fresh: bool) -> None:
    """Train a small language model on Python's standard library and read what it writes.

    Needs no network and no GPU; a few minutes on two cores. A second call continues, or shows what is there.

    \b
    Example:
        modalities quickstart
    """
    click.echo(f"1/3  data: the standard library of this Python, in {folder / 'data'}")
    prepare(folder / "data")
    click.echo(f"2/3  training: what {CONFIG.name} says, in {folder}")
    # In a function of its own, so that the trained objects are gone before the model is loaded back.
    progress = _train(folder, steps, fresh)
    click.echo(f"3/3  text: what the model writes after {progress.step} steps")
    _write(folder)
    click.echo(f"\nYours now: the document {folder / 'config.yaml'}, the measures {folder / 'metrics.jsonl'}, and")
    click.echo(f'  modalities generate {folder} --prompt "def "')
    again = f"{folder / 'config.resolved.yaml'} --folder {folder}"
    click.echo(f"  modalities run {again} settings.steps={progress.step * 2}   # to train on")


def prepare(folder: Path) -> None:
    """Corpus, split, tokenizer and packed tokens in ``folder``; what is there is kept."""
    from itertools import islice

    from modalities_data.corpus import write_standard_library
    from modalities_data.jsonl import documents
    from modalities_data.prepare.pack import pack
    from modalities_data.prepare.split import split
    from modalities_data.terminal import packing_progress
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
    from modalities_data.tokenizers.train import train_tokenizer

    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    texts = {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}
    folder.mkdir(parents=True, exist_ok=True)
    if not corpus.exists():
        report = write_standard_library(corpus)
        click.echo(f"     {report.documents} files, {report.text_bytes / 1e6:.0f} MB of source")
    if not all(path.exists() for path in texts.values()):
        split(corpus, texts["train"], texts["held_out"], HELD_OUT_FRACTION)
    if not tokenizer.exists():
        # Every third file is enough for 2,048 ids and takes a third of the time.
        size = train_tokenizer(islice(documents(texts["train"]), 0, None, 3), tokenizer, VOCAB_SIZE)
        click.echo(f"     a tokenizer of {size} ids, trained on it")
    for name, source in texts.items():
        if not (folder / name).exists():
            with packing_progress() as progress:
                packed = pack(source, folder / name, HuggingFaceTokenizer(tokenizer), on_progress=progress)
            click.echo(f"     {name}: {packed.manifest.tokens / 1e6:.2f} million tokens")


def _train(folder: Path, steps: int | None, fresh: bool) -> Progress:
    from modalities_cli.run import train

    overrides = [f"settings.data={(folder / 'data').resolve()}"]
    if steps is not None:
        overrides.append(f"settings.steps={steps}")
    return train(CONFIG, tuple(overrides), folder, fresh)


def _write(folder: Path) -> None:
    from modalities_cli.generate import continuation
    from modalities_cli.wiring import open_run, trained_model

    graph = open_run(folder)
    tokenizer = graph.build("tokenizer")
    model, _ = trained_model(graph, folder)
    for prompt in PROMPTS:
        text = continuation(model, tokenizer, prompt, max_new_tokens=96, seed=1, temperature=0.7, top_p=0.95)
        click.echo(f"\n>>> {prompt}{text}")
