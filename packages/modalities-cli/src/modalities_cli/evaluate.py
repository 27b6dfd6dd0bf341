"""``modalities eval``: figures of lm-eval's tasks for a trained model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager  # pyrefly: ignore[missing-import]

NEEDED = ("lm_eval", "accelerate", "transformers")
"""What the extra brings; lm-eval alone does without the last two."""
STDERR = "_stderr"
COUNTER = "HF_UPDATE_DOWNLOAD_COUNTS"
"""Unless told not to, the reader of tasks' data reports every use to a server, of files on this machine too."""


@click.command("eval")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, help="Names of lm-eval's tasks, groups or tags, with commas between.")
@click.option(
    "--include-path", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with tasks of your own (YAML); looked through first.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Only the first N questions of each task.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Solved examples before each question.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences at a time.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures to this JSON file too.")
def evaluate(
    source: Path,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    device: str,
    out: Path | None,
) -> None:
    """Measure the model in SOURCE by tasks of EleutherAI's lm-eval.

    SOURCE is a run's folder, a checkpoint of one, or a Hugging Face folder. A run is exported first, to a folder
    under TMPDIR that is removed afterwards, so the figures are those that anybody gets with lm-eval on the export.

    Needs `pip install "modalities-cli[eval]"`. Nothing is downloaded unless a task's own data lies on the hub.

    \b
    Example:
        modalities eval runs/quickstart --tasks my_task --include-path tasks/ --out figures.json
        modalities eval runs/quickstart/checkpoints/step-00000300 --tasks hellaswag,arc_easy --limit 200
    """
    from modalities_cli.source import chosen_device
    from modalities_core.errors import ConfigError

    require_extra()
    os.environ.setdefault(COUNTER, "0")
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: its folder does not exist")
    chosen = chosen_device(device)
    names = list(dict.fromkeys(name for name in (part.strip() for part in tasks.split(",")) if name))
    manager = found_tasks(names, include_path)
    loaded = [task for name in names for task in _loaded(manager, name)]
    with exported(source) as folder:
        results = measured(folder, loaded, manager, chosen, batch_size, limit, num_fewshot)
    _show(results)
    if out is not None:
        _write(out, source, limit, results)


def require_extra() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ConfigError: it, or what it needs for models of transformers, is not installed.
    """
    from importlib.util import find_spec

    from modalities_core.errors import ConfigError

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"modalities eval needs lm-eval ({', '.join(missing)} not found)",
            hint='pip install "modalities-cli[eval]"',
        )


def found_tasks(names: list[str], include_path: Path | None) -> TaskManager:
    """An index of tasks that has all of ``names``.

    Raises:
        ConfigError: there is no task of that name.
    """
    from lm_eval.tasks import TaskManager  # pyrefly: ignore[missing-import]

    from modalities_core.errors import ConfigError
    from modalities_core.spelling import did_you_mean

    if not names:
        raise ConfigError("no task is named", hint="--tasks NAME[,NAME]")
    if include_path is not None:
        # lm-eval's own tasks are 14,000 files: only read where they are meant. A group may mean some of them.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks) - set(own.all_groups):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no task `{name}`{did_you_mean(name, known)}",
                hint="`lm_eval ls tasks` lists those of lm-eval; --include-path DIR adds your own",
            )
    return manager


def _loaded(manager: TaskManager, name: str) -> list[Any]:
    """The task, the group, or the tasks of the tag called ``name``, with their data.

    Raises:
        DataError: its definition or its data cannot be read.
        ConfigError: it runs code that a model wrote.
    """
    from modalities_core.errors import ConfigError, DataError, first_line

    try:
        found = manager.load([name])
    except Exception as error:  # whatever a task's own code or the data's reader raises
        reason = first_line(error)
        raise DataError(
            f"the task {name} cannot be loaded: {type(error).__name__}: {reason}",
            hint="its data have to be on this machine, or on the hub with a way to get there",
        ) from error
    unsafe = [task for task, loaded in found["tasks"].items() if getattr(loaded, "UNSAFE_CODE", False)]
    if unsafe:
        raise ConfigError(
            f"the task {unsafe[0]} runs code that the model writes",
            hint="`modalities export` the model and run lm_eval with --confirm_run_unsafe_code inside a sandbox",
        )
    groups = found["groups"]
    return [groups[name]] if name in groups else list(found["tasks"].values())


@contextmanager
def exported(source: Path) -> Iterator[Path]:
    """A Hugging Face folder with the model in ``source``; for a run or a checkpoint a temporary one, verified.

    Raises:
        ConfigError: there is no model, or none that a class of transformers can express.
        CheckpointError: there is no valid checkpoint.
    """
    from tempfile import TemporaryDirectory

    from modalities_cli.wiring import run_of
    from modalities_core.errors import ConfigError

    if run_of(source) is not None:
        from modalities_cli.export import export_run

        with TemporaryDirectory(prefix="modalities-eval-") as place:
            done = export_run(source, Path(place) / "model")
            for warning in done.warnings:
                click.echo(f"warning: {warning}", err=True)
            click.echo(f"{source}: the model of step {done.step} as a {done.class_name}", err=True)
            yield Path(place) / "model"
    elif (source / "config.json").is_file():
        if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise ConfigError(f"{source} has no tokenizer", hint="copy the tokenizer's files beside config.json")
        yield source
    else:
        raise ConfigError(
            f"{source} is not the folder of a run, a checkpoint of one, or a Hugging Face model",
            hint="`modalities run` makes a run; a Hugging Face model is a folder on this machine with a config.json",
        )


def measured(
    folder: Path,
    tasks: list[Any],
    manager: TaskManager,
    device: str,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, Any]:
    """What lm-eval finds, in its own form, without the single answers.

    Args:
        folder: a Hugging Face folder.
        tasks: loaded tasks and groups.
        manager: the index they come from.
        device: cpu or cuda.
        batch_size: sequences at a time.
        limit: only the first so many questions of each task.
        num_fewshot: solved examples before each question; None leaves what the task says.
    """
    from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]

    # By its full path: anything that may be a name on the hub is asked for there.
    arguments = {"pretrained": str(folder.resolve()), "trust_remote_code": False}
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        limit=limit,
        log_samples=False,
    )
    assert found is not None, "one process is rank 0"
    return dict(found)


def figures(results: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None, int]]:
    """Every figure: task or group, metric, value, its standard error if there is one, and questions asked."""
    for part in ("results", "groups"):
        for task, entries in results.get(part, {}).items():
            if part == "groups" and task in results["results"]:
                continue
            asked = results.get("n-samples", {}).get(task, {}).get("effective", 0)
            for key, value in entries.items():
                metric, _, filtered = key.partition(",")
                if not filtered or metric.endswith(STDERR) or not isinstance(value, int | float):
                    continue
                error = entries.get(f"{metric}{STDERR},{filtered}")
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                yield task, name, float(value), error if isinstance(error, float) else None, asked


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column, side in {
        "task": "left",
        "metric": "left",
        "value": "right",
        "±": "right",
        "questions": "right",
    }.items():
        table.add_column(column, justify="right" if side == "right" else "left")
    for task, metric, value, error, asked in figures(results):
        table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", f"{asked:,}")
    Console().print(table)


def _write(out: Path, source: Path, limit: int | None, results: dict[str, Any]) -> None:
    """lm-eval's own keys, so that whatever reads its files reads this one."""
    import json
    from importlib.metadata import version

    from modalities_core.files import write_text

    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    content = {
        "source": str(source),
        "limit": limit,
        "lm_eval_version": version("lm_eval"),
        **{key: results[key] for key in kept if key in results},
    }
    write_text(out, json.dumps(content, indent=2, ensure_ascii=False, default=float) + "\n")
