"""Makes the ``*_parts`` importable for the tests beside them, and trains what more than one of them needs."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few sentences, a tokenizer.json of 300 ids and both packed, for the runs of ``export_parts``."""
    from export_parts import TEXTS

    from modalities_data.prepare.pack import pack
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
    from modalities_data.tokenizers.train import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(iter(TEXTS), folder / "tokenizer.json", 300)
    pack(folder / "texts.jsonl", folder / "packed", HuggingFaceTokenizer(folder / "tokenizer.json"), workers=1)
    return folder


@pytest.fixture(scope="session")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs of small models by name, each trained when it is first asked for."""
    from export_parts import Runs

    return Runs(data, tmp_path_factory.mktemp("runs"))
