"""The checkpoints of one folder: which are valid, which belong to the current line of training, which can go.

A line is a chain of parents. Going on from an older checkpoint starts another line; what the old one had beyond it
moves to ``abandoned/``. Where that did not happen, the order of commits tells which line is the current one.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from modalities_core.errors import CheckpointError
from modalities_core.files import sync_folder
from modalities_core.training.manifest import MANIFEST, Manifest, damage, read_manifest, signature

ABANDONED = "abandoned"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(tmp|deleting)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint and where it lies."""

    folder: Path
    manifest: Manifest


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> dict[int, Path]:
    """Folders that have a checkpoint's name, by step, newest first; whether they are valid is another matter."""
    if not folder.is_dir():
        return {}
    named = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    found = {int(match[1]): path for match, path in named if match and path.name == step_name(int(match[1]))}
    return dict(sorted(found.items(), reverse=True))


class Shelf:
    """The checkpoints of one folder; remembers which it has verified.

    Args:
        folder: where the ``step-...`` folders lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}

    def manifests(self) -> tuple[dict[int, Manifest], dict[int, str]]:
        """Readable manifests by step, and for the other folders what is wrong with them."""
        readable: dict[int, Manifest] = {}
        broken: dict[int, str] = {}
        for step, path in step_folders(self.folder).items():
            try:
                manifest = read_manifest(path)
                if manifest.step == step:
                    readable[step] = manifest
                else:
                    broken[step] = f"{path} says that it is of step {manifest.step}"
            except CheckpointError as error:
                broken[step] = error.message
            except OSError as error:
                broken[step] = f"{path} cannot be read ({error.strerror})"
        return readable, broken

    def problems(self, manifest: Manifest) -> list[str]:
        """What is damaged in the checkpoint of this manifest; files unchanged since the last call are not re-read."""
        path = self.folder / step_name(manifest.step)
        try:
            current = signature(path, manifest)
            if self._verified.get(path) == current:
                return []
        except OSError:
            return damage(path, manifest) or ["a file disappeared"]
        found = damage(path, manifest)
        if not found:
            self._verified[path] = current
        return found

    def note_verified(self, manifest: Manifest) -> None:
        """Remember that every byte of it was just read back."""
        path = self.folder / step_name(manifest.step)
        self._verified[path] = signature(path, manifest)

    def newest_valid(self, at_step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint of the current line whose every byte is as written, and what was passed over and why.

        Args:
            at_step: take this one and no other.

        Raises:
            CheckpointError: there are checkpoints, but none is valid, or ``at_step`` is not there or damaged.
        """
        readable, broken = self.manifests()
        if at_step is not None:
            return self._exactly(at_step, readable, broken), []
        passed = dict(broken)
        for manifest in line(readable):
            path = self.folder / step_name(manifest.step)
            if clauses := self.problems(manifest):
                passed[manifest.step] = f"{path} is damaged: {', '.join(clauses)}"
            else:
                newer = [reason for step, reason in sorted(passed.items(), reverse=True) if step > manifest.step]
                return Checkpoint(path, manifest), [f"passed over a checkpoint: {reason}" for reason in newer]
        if not passed:
            return None, []
        raise CheckpointError(
            f"none of the checkpoints in {self.folder} is valid: {'; '.join(passed.values())}",
            hint="restore one from a copy, or start afresh, which keeps the old files aside",
        )

    def _exactly(self, step: int, readable: dict[int, Manifest], broken: dict[int, str]) -> Checkpoint:
        path = self.folder / step_name(step)
        if step not in readable:
            have = ", ".join(str(number) for number in sorted(readable)) or "none"
            missing = f"there is no checkpoint of step {step} in {self.folder}; there are those of steps {have}"
            raise CheckpointError(broken.get(step, missing))
        if clauses := self.problems(readable[step]):
            raise CheckpointError(f"{path} is damaged: {', '.join(clauses)}")
        return Checkpoint(path, readable[step])

    def abandon(self, kept: Manifest) -> list[str]:
        """Move to ``abandoned/`` what is newer than ``kept`` or not among its ancestors; gives the names moved."""
        readable, _ = self.manifests()
        ancestors = {manifest.step for manifest in line(readable, kept)}
        moved = []
        # Newest first: stopped half way, what is left is still one line with its older end.
        for step, path in step_folders(self.folder).items():
            if step > kept.step or (step in readable and step not in ancestors):
                self.set_aside(path)
                moved.append(path.name)
        return moved

    def set_aside(self, path: Path) -> Path:
        """Move one checkpoint to ``abandoned/`` under a name that is free there."""
        target = self.folder / ABANDONED
        target.mkdir(exist_ok=True)
        names = [path.name, *(f"{path.name}.{number}" for number in range(1, 1 + len(list(target.iterdir()))))]
        free = next(target / name for name in names if not (target / name).exists())
        os.replace(path, free)
        sync_folder(target)
        sync_folder(self.folder)
        return free

    def retain(self, newest: Manifest, keep: int) -> list[str]:
        """Delete what is older than the ``keep`` newest valid checkpoints of the line that ends in ``newest``.

        Damaged ones do not count, folders without a manifest of ours are left alone.

        Returns:
            Names of the deleted folders.
        """
        readable, _ = self.manifests()
        valid = 0
        deleted = []
        for manifest in line(readable, newest):
            if valid >= keep:
                self._delete(self.folder / step_name(manifest.step))
                deleted.append(step_name(manifest.step))
            elif not self.problems(manifest):
                valid += 1
        return deleted

    def next_commit(self) -> int:
        """One more than the largest commit number here."""
        readable, _ = self.manifests()
        return 1 + max((manifest.commit for manifest in readable.values()), default=0)

    def sweep(self) -> None:
        """Remove what an interrupted save or deletion left under a hidden name."""
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path)

    def _delete(self, path: Path) -> None:
        # Out of sight in one rename, then the manifest, then the rest: at no instant a damaged one is visible.
        hidden = path.with_name(f".{path.name}.deleting")
        os.replace(path, hidden)
        (hidden / MANIFEST).unlink()
        shutil.rmtree(hidden)
        self._verified.pop(path, None)


def line(manifests: dict[int, Manifest], head: Manifest | None = None) -> list[Manifest]:
    """``head``, by default the one committed last, and its ancestors, newest first.

    Where a parent is gone, the line goes on with the newest one below it.
    """
    if head is None:
        head = max(manifests.values(), key=lambda manifest: manifest.commit, default=None)
    chain: list[Manifest] = []
    while head is not None:
        chain.append(head)
        parent = -1 if head.parent_step is None else min(head.parent_step, head.step - 1)
        below = [step for step in manifests if step <= parent]
        head = manifests[max(below)] if below else None
    return chain


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint in ``folder``, every byte verified; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    return Shelf(folder).newest_valid()[0]
