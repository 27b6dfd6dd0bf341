"""``modalities eval``: a task of our own from end to end, without network, its figures computed a second time."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modalities_models.decoder import Decoder
from modalities_models.huggingface.loading import Checkpoint
from modalities_models.initialization import Scaled

WORDS = ("the", "cat", "dog", "sees", "likes", "a", "bird", "tree", "red", "small", "old", "house")
QUESTIONS, CHOICES = 40, 4

# Whatever looks up a name or opens a connection is written down and refused.
WITHOUT_NETWORK = """
import socket, sys
def refuse(*arguments, **keywords):
    with open({attempts!r}, "a") as file:
        file.write(repr(arguments) + chr(10))
    raise OSError("no network in this test")
socket.getaddrinfo = socket.socket.connect = socket.create_connection = refuse
from modalities_cli.__main__ import main
sys.argv = ["modalities", *sys.argv[1:]]
sys.exit(main())
"""


def make_tokenizer(folder: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<unk>", "<end>", *WORDS))}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return vocabulary


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama and its tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "model"
    vocabulary = make_tokenizer(folder)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with data of their own: which sentence goes on, and how likely whole texts are."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    questions = [
        {
            "question": words(draw.randint(2, 6)),
            "choices": [words(n) for n in (1, 2, 2, 3)],
            "answer": draw.randrange(4),
        }
        for _ in range(QUESTIONS)
    ]
    texts = [{"text": words(draw.randint(5, 20))} for _ in range(12)]
    for name, rows in {"questions": questions, "texts": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    (folder / "text.yaml").write_text(f"""
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    (folder / "broken.yaml").write_text(f"""
task: tiny_broken
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/nowhere.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
""")
    return folder


def evaluate(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    attempts = tmp_path / "attempts"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf_home"), "COLUMNS": "100"}
    command = [sys.executable, "-c", WITHOUT_NETWORK.format(attempts=str(attempts)), "eval", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert not attempts.exists(), attempts.read_text() + done.stderr
    return done


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_probabilities(model):
    """Of the tokens after the first, by a decoder of ours: (ids) to (ids - 1) values, computed in float64."""
    model.double().eval()

    @torch.no_grad()
    def of(ids: list[int]) -> list[float]:
        tokens = torch.tensor([ids])
        logits = model.head(model(tokens))[0, :-1]
        return logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1).tolist()

    return of


def accuracy(of, start: list[int], encode, tasks: Path) -> float:
    """How often the likeliest continuation of all is the right one."""
    right = 0
    for row in read(tasks / "questions.jsonl"):
        question = [*start, *encode(row["question"])]
        scores = [sum(of(question + encode(f" {it}"))[len(question) - 1 :]) for it in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    return right / QUESTIONS


def bits_per_byte(of, start: list[int], encode, tasks: Path) -> float:
    """Of whole texts that follow the end of another."""
    texts = [row["text"] for row in read(tasks / "texts.jsonl")]
    nats = -sum(sum(of([*start, *encode(text)])) for text in texts)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def words_of(text: str) -> list[int]:
    return [WORDS.index(word) + 2 for word in text.split()]


@pytest.mark.slow
def test_figures_are_those_of_our_own_logits(hugging_face: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    out = tmp_path / "figures.json"
    names = "tiny_choice,tiny_text"
    done = evaluate(tmp_path, hugging_face, "--tasks", names, "--include-path", tasks, "--out", out, "--batch-size", 3)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    checkpoint = Checkpoint(hugging_face)
    model = Decoder(checkpoint.architecture, Scaled())
    model.load_state_dict(dict(checkpoint.tensors()))
    of = log_probabilities(model)
    wanted = accuracy(of, [], words_of, tasks)
    assert 0.1 < wanted < 0.9
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(wanted, abs=1e-9)
    bits = bits_per_byte(of, [1], words_of, tasks)
    assert found["results"]["tiny_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["n-samples"]["tiny_choice"] == {"original": QUESTIONS, "effective": QUESTIONS}
    assert "tiny_choice" in done.stdout and f"{wanted:.4f}" in done.stdout and f"{bits:.4f}" in done.stdout


@pytest.mark.slow
def test_a_run_is_asked_as_it_was_trained(modalities, root: Path, tasks: Path, tmp_path: Path) -> None:
    """Its texts follow the end of another document, and its figures are those of its newest checkpoint."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from modalities_cli.wiring import open_run, trained_model

    run, out = tmp_path / "run", tmp_path / "figures.json"
    config = root / "config_files" / "config_lorem_ipsum.yaml"
    options = ["settings.steps=3", "trainer.schedule={component: schedule.constant}", "trainer.evaluations=[]"]
    done = modalities("run", config, "--folder", run, *options)
    assert done.returncode == 0, done.stderr
    done = evaluate(tmp_path, run, "--tasks", "tiny_choice,tiny_text", "--include-path", tasks, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "the model of step 3 as a LlamaForCausalLM" in done.stderr
    found = json.loads(out.read_text())["results"]
    model, _ = trained_model(open_run(run), run)
    of, start = log_probabilities(model), [256]
    assert found["tiny_choice"]["acc,none"] == pytest.approx(accuracy(of, start, bytes_of, tasks), abs=1e-9)
    # lm-eval gives whole texts a first token and counts the one that the tokenizer writes after it, of any model.
    bits = bits_per_byte(of, start * 2, bytes_of, tasks)
    assert found["tiny_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_a_limit_is_kept_and_said(hugging_face: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    out = tmp_path / "figures.json"
    done = evaluate(
        tmp_path, hugging_face, "--tasks", "tiny_choice", "--include-path", tasks, "--limit", 5, "--out", out,
        "--num-fewshot", 0, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["limit"] == 5 and found["n-samples"]["tiny_choice"]["effective"] == 5


@pytest.mark.slow
def test_data_that_is_missing_is_an_error_of_the_data(hugging_face: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    done = evaluate(tmp_path, hugging_face, "--tasks", "tiny_broken", "--include-path", tasks)
    assert done.returncode == 3, done.stderr
    assert "error: the task tiny_broken cannot be loaded: FileNotFoundError" in done.stderr


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_the_nearest(hugging_face: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    done = evaluate(tmp_path, hugging_face, "--tasks", "tiny_choise", "--include-path", tasks)
    assert done.returncode == 2, done.stderr
    assert "there is no task `tiny_choise`; did you mean `tiny_choice`?" in done.stderr


def test_without_lm_eval_it_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from modalities_cli.evaluate import require_extra
    from modalities_core.errors import EXIT_CONFIG, ConfigError

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(ConfigError, match="needs lm-eval") as caught:
        require_extra()
    assert caught.value.hint == 'pip install "modalities-cli[eval]"'
    assert caught.value.exit_code == EXIT_CONFIG


def test_figures_of_tasks_and_groups_with_their_errors() -> None:
    from modalities_cli.evaluate import figures

    results = {
        "results": {
            "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1},
            "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        },
        "groups": {"all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"}},
        "n-samples": {"one": {"original": 9, "effective": 4}},
    }
    assert list(figures(results)) == [
        ("one", "acc", 0.5, 0.1, 4),
        ("one", "exact_match (strict)", 1.0, None, 4),
        ("all", "acc", 0.5, None, 0),
    ]
