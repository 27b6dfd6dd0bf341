"""What the tests that span packages share: where things lie, and the built distributions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # for parallel_matrix_parts


@dataclass(frozen=True)
class Package:
    """One of the five packages: its folder and its parsed pyproject.toml."""

    folder: Path

    @property
    def metadata(self) -> dict:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def import_names(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("src/*/__init__.py"))

    def sources(self) -> list[Path]:
        """Every file that is part of the package, without caches."""
        return sorted(p for p in self.folder.glob("src/**/*") if p.is_file() and "__pycache__" not in p.parts)


PACKAGES = [Package(path.parent) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``package`` runs once per package."""
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", PACKAGES, ids=lambda package: package.name)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def packages() -> list[Package]:
    """The five packages."""
    return PACKAGES


@pytest.fixture(scope="session")
def version() -> str:
    """What VERSION says."""
    return (ROOT / "VERSION").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of every package."""
    folder = tmp_path_factory.mktemp("distributions")
    for package in PACKAGES:
        build(package.folder, folder, "sdist", "wheel")
    return folder


def build(project: Path, folder: Path, *targets: str) -> None:
    """Build ``project`` into ``folder`` with the build backend itself, in this environment."""
    chosen = [word for target in targets for word in ("--target", target)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *chosen]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment for a Python of its own: nothing here points it at this one's packages."""
    return clean_environment()


@pytest.fixture(scope="session")
def build_project():
    """Build a project folder: ``build_project(project, output_folder, *targets)``."""
    return build


def clean_environment() -> dict[str, str]:
    """This process's environment without what points Python at other places."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def one_thread(threads: int | None = 1) -> dict[str, str]:
    """The environment for a command that computes; None leaves the number of threads to torch."""
    base = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return base if threads is None else {**base, "OMP_NUM_THREADS": str(threads)}


@pytest.fixture(scope="session")
def modalities(tmp_path_factory: pytest.TempPathFactory):
    """Run the command: ``modalities("check", config)``; gives the finished process with its output as text."""
    folder = tmp_path_factory.mktemp("commands")

    def run(*arguments: object, timeout: float = 240, threads: int | None = 1, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "modalities", *map(str, arguments)]
        environment = one_thread(threads) if env is None else env
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=folder, env=environment)

    return run


@pytest.fixture
def start_modalities(tmp_path: Path):
    """Start the command and go on; what is still running at the end of the test is killed."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "modalities", *map(str, arguments)]
        log = (tmp_path / f"output-{len(started)}.txt").open("wb")
        with log:
            # Whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that.
            restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=one_thread(), **restored)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory):
    """Run the command on several ranks: ``torchrun(2, "run", config)``."""
    folder = tmp_path_factory.mktemp("ranks")
    script = ROOT / "packages" / "modalities-cli" / "src" / "modalities" / "__main__.py"

    def run(ranks: int, *arguments: object, timeout: float = 280):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(ranks)]
        # Port 0: the launcher takes a free one, so that tests can run side by side.
        command = [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", script, *arguments]
        words = [str(word) for word in command]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=folder, env=one_thread())

    return run


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the configurations expect it: tokenizer.json with 4096 ids, train and held_out, packed."""
    from modalities_data.corpus import write_standard_library
    from modalities_data.jsonl import documents
    from modalities_data.prepare.pack import pack
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
    from modalities_data.tokenizers.train import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    write_standard_library(folder / "whole.jsonl")
    with (folder / "whole.jsonl").open("rb") as whole, (folder / "some.jsonl").open("wb") as some:
        some.writelines(line for number, line in enumerate(whole) if number % 20 == 0)
    train_tokenizer(documents(folder / "some.jsonl"), folder / "tokenizer.json", 4096)
    for name in ("train", "held_out"):
        pack(folder / "some.jsonl", folder / name, HuggingFaceTokenizer(folder / "tokenizer.json"), workers=1)
    _write_other_tokenizers(folder)
    _write_pairs(folder)
    _write_checkpoint(folder / "hugging_face")
    return folder


def _write_checkpoint(folder: Path) -> None:
    """A nano decoder as Hugging Face has them."""
    from modalities_models.decoder import decoder
    from modalities_models.huggingface.exporting import export

    folder.mkdir()
    model = decoder("nano", vocab_size=300, sequence_length=32)
    export(folder, model.architecture, model.state_dict().__getitem__)


def _write_pairs(folder: Path) -> None:
    """Four images of 8 x 8 with a caption each."""
    import numpy as np

    from modalities_data.image_text import write_image_text

    captions = ("one", "two", "three", "four")
    write_image_text(
        folder / "pairs", ((np.full((8, 8, 3), 60 * n, np.uint8), text) for n, text in enumerate(captions))
    )


def _write_other_tokenizers(folder: Path) -> None:
    """Ranks of all bytes, and a SentencePiece model that changes nothing of a text."""
    import sentencepiece

    ranks = [f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "bytes.tiktoken").write_text("".join(ranks))
    with (folder / "some.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text to train on"] * 20), model_writer=model, vocab_size=280,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
