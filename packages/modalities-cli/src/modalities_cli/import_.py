"""``modalities import``: a model of Hugging Face's as the start of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modalities_models.huggingface.files import TensorInfo, Weights
    from modalities_models.huggingface.loading import Checkpoint

TEMPLATE = Path(__file__).parent / "imported.yaml"
LONGEST = 2048
"""Of the sequences in the document that is written, where the model takes more."""


@click.command("import")
@click.argument("source", metavar="HF_DIR", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of the weights.  [default: as they are stored]")  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not compare the logits with those of transformers.")
def import_(source: Path, folder: Path, dtype: str | None, no_verify: bool) -> None:
    """Make DIR out of HF_DIR, a folder of Hugging Face's with config.json and safetensors: the start of a run.

    DIR holds the weights, the tokenizer, and config.yaml, a document that trains on from them: set its data and run
    it. `modalities generate DIR` writes with them as they are. Settings that Modalities cannot follow are refused by
    name; pickles and code in HF_DIR are never run. At last our logits are compared with those of transformers; where
    they differ, DIR is not made.

    \b
    Example:
        modalities import Qwen3-0.6B start/
        modalities data pack texts.jsonl corpus/ --tokenizer start/ --end-of-document "<|endoftext|>"
        modalities run start/config.yaml settings.data=$PWD/corpus
    """
    import torch

    from modalities_cli.export import agreement_line
    from modalities_models.huggingface.exporting import new_folder
    from modalities_models.huggingface.family import shapes_of
    from modalities_models.huggingface.loading import Checkpoint
    from modalities_models.huggingface.pretrained import pretrained
    from modalities_models.huggingface.verifying import require_transformers, verify

    if not no_verify:
        require_transformers()
    checkpoint = Checkpoint(source)
    agreement = None
    with new_folder(folder) as temporary:
        copy_weights(checkpoint, temporary, None if dtype is None else getattr(torch, dtype))
        copy_rest(checkpoint, temporary, dtype)
        end = end_token(checkpoint, temporary)
        (temporary / "config.yaml").write_text(document(checkpoint, source, folder, end), encoding="utf-8")
        if not no_verify:
            agreement = verify(pretrained(temporary), temporary)
    count = sum(torch.Size(shape).numel() for shape in shapes_of(checkpoint.architecture).values())
    click.echo(f"{folder}: a {checkpoint.family.class_name} of {count:,} parameters")
    click.echo(agreement_line(agreement))
    if end is None:
        click.echo(f"warning: {source} has no tokenizer.json; {folder / 'config.yaml'} names no tokenizer", err=True)
    click.echo(f"Next: set the data of {folder / 'config.yaml'}, then")
    click.echo(f"  modalities run {folder / 'config.yaml'} settings.data=DIR")


def copy_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the tensors of a checkpoint again, one by one: under the full names, and none that the model does not use.

    Raises:
        CheckpointError: tensors are missing, left over, or damaged.
        ResourceError: the disk is full.
    """
    from modalities_models.huggingface.files import TensorInfo, Weights, write

    weights = Weights(checkpoint.folder)
    stored = checkpoint.stored_names(weights)
    plan = []
    for name in sorted(stored, key=lambda name: (-weights.info(stored[name]).dtype.itemsize, stored[name])):
        _, shape, kind = weights.info(stored[name])
        plan.append(TensorInfo(name, shape, kind if dtype is None or _keeps(name) else dtype))
    write(folder, plan, _tensors(weights, plan, stored))


def _keeps(name: str) -> bool:
    """Whether a tensor stays as it is beside weights of any type: biases of the choice of experts."""
    return name.endswith("e_score_correction_bias")


def _tensors(weights: Weights, plan: list[TensorInfo], stored: dict[str, str]) -> Iterator[Tensor]:
    for info in plan:
        yield weights.tensor(stored[info.name]).to(info.dtype)


def copy_rest(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> None:
    """config.json, and what there is of tokenizer, chat template and generation_config.json; no code."""
    from modalities_models.huggingface.tokenizer import FILES

    values = {key: value for key, value in checkpoint.settings.values.items() if key != "auto_map"}
    if dtype is not None:
        values.pop("dtype", None)
        values["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def end_token(checkpoint: Checkpoint, folder: Path) -> str | None:
    """The text of the token that ends a document, or None where there is no tokenizer.json that has one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(file))
    for name in ("generation_config.json", "config.json"):
        values: dict[str, Any] = {}
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        ids = values.get("eos_token_id")
        for number in ids if isinstance(ids, list) else [ids]:
            if isinstance(number, int) and (token := library.id_to_token(number)) is not None:
                return token
    return None


def document(checkpoint: Checkpoint, source: Path, folder: Path, end: str | None) -> str:
    """A document that trains on from the weights beside it."""
    text = TEMPLATE.read_text(encoding="utf-8")
    if end is None:
        before, _, rest = text.partition("tokenizer:\n")
        text = before + rest.partition("\n\n")[2]
    values = {
        "SOURCE": source.name,
        "FOLDER": folder.name,
        "CLASS": checkpoint.family.class_name,
        "LENGTH": str(min(LONGEST, checkpoint.architecture.sequence_length)),
        "END": json.dumps(end),
    }
    for name, value in values.items():
        text = text.replace(f"<{name}>", value)
    return text
