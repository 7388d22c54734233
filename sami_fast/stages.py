"""Stages of a run: each writes a folder, says in its manifest what it was made from, and is made once.

`manifest.json` of a stage holds its inputs (configuration, hashes of files, seed), the versions it ran with, and, once
it is complete, its outputs with size and hash. A stage that is complete with the same inputs and whose outputs are
still there is skipped; one that was cut off goes on from what its folder holds; one whose inputs changed starts anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sami_fast.report import write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PACKAGES = ("sami-fast", "torch", "transformers", "accelerate", "datasets", "peft", "vllm")
# Files above this are told apart by size alone when a finished stage is looked at again.
_REHASH_LIMIT = 64 * 2**20


class StageError(RuntimeError):
    """A stage could not be finished; what the stages before it wrote is kept, and it goes on in the next run."""


class Run:
    """A folder of stages, used by one process at a time.

    Args:
        folder: created if need be.

    Raises:
        StageError: another process is at work in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Run]:
        """Hold the folder's lock; the system lets go of it when the process ends, however it ends."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield self
        except Timeout:
            raise StageError(f"{self.folder}: another run is at work in this folder") from None

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[Path], Mapping[str, Any] | None],
        *,
        scratch: tuple[str, ...] = (),
        keep: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Do `work(folder)` unless it is done; returns the manifest.

        Args:
            name: folder of the stage inside the run's, `iteration-1/training`.
            inputs: all that the outputs depend on, as JSON holds it. A change starts the stage anew.
            work: fills the folder, going on from what it finds there; what it returns is kept in the manifest.
            scratch: files and folders in it that are removed when the stage is complete.
            keep: files in it that outlive a change of inputs: logs whose rows say themselves what they are about.

        Raises:
            StageError: a full disk or another failure to write; names the stage.
            ValueError: a folder of that name that is none of ours.
        """
        folder = self.folder / name
        inputs = json.loads(json.dumps(inputs, allow_nan=False))
        _take_over(folder, keep)  # where a process was killed while it cleared the folder
        manifest = read_manifest(folder)
        if manifest is None:
            _refuse_foreign(folder, keep)
        elif manifest["inputs"] != inputs:
            logger.info("%s: %s changed, starting anew", name, ", ".join(_changes(manifest["inputs"], inputs)))
            _clear(folder, keep)
            manifest = None
        elif manifest["status"] == "complete":
            damaged = _damaged(folder, manifest["outputs"])
            if damaged is None:
                logger.info("%s: complete, skipped", name)
                return manifest
            logger.warning("%s: %s is not as it was written, starting anew", name, damaged)
            written = manifest["outputs"]
            _clear(folder, tuple(n for n in keep if n in written and _damaged(folder, {n: written[n]}) is None))
            manifest = None
        else:
            logger.info("%s: was cut off, going on", name)
        begun = manifest["begun"] if manifest else datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {"stage": name, "status": "running", "begun": begun, "inputs": inputs, "versions": _versions()}
        start = time.perf_counter()
        try:
            write_json(folder / MANIFEST, manifest)
            for leftover in folder.glob(".*"):  # of files that were being written when a run was killed
                if leftover.is_file():
                    leftover.unlink()
            results = work(folder)
            for leftover in scratch:
                shutil.rmtree(folder / leftover, ignore_errors=True)
            outputs = {str(path.relative_to(folder)): _describe(path) for path in _files(folder)}
            manifest |= {
                "status": "complete",
                "seconds": time.perf_counter() - start,
                "results": dict(results or {}),
                "outputs": outputs,
            }
            write_json(folder / MANIFEST, manifest)
        except Exception as error:
            reason = _writing_failed(error)
            if reason is None:
                raise
            raise StageError(f"{folder}: {reason}; finished work is kept, run again to go on") from error
        logger.info("%s: done in %.1f s", name, manifest["seconds"])
        return manifest


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """A stage's manifest, or None where there is none.

    Raises:
        ValueError: a manifest that is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["inputs"], manifest["status"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected the manifest of a stage, got something else; remove its folder") from None
    return manifest


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
    return whole.hexdigest()


def outputs_digest(manifest: Mapping[str, Any], *prefixes: str) -> str:
    """One hash for the outputs of a complete stage whose names start with one of `prefixes`."""
    chosen = {name: entry["sha256"] for name, entry in manifest["outputs"].items() if name.startswith(prefixes)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """Files of a stage that are its outputs: all but the manifest and temporary ones."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path.name != MANIFEST and not path.name.startswith(".")]


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": digest(path)}


def _damaged(folder: Path, outputs: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, entry in outputs.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return name
        if entry["size"] <= _REHASH_LIMIT and digest(path) != entry["sha256"]:
            return name
    return None


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    """Remove a stage, but for the files to keep, so that, if that is cut off, no half of it stays under its name."""
    os.replace(folder, _aside(folder))
    _take_over(folder, keep)


def _take_over(folder: Path, keep: tuple[str, ...]) -> None:
    """Out of a stage that was moved aside take the files to keep, and remove the rest."""
    old = _aside(folder)
    for name in keep:
        if (old / name).is_file():
            folder.mkdir(exist_ok=True)
            os.replace(old / name, folder / name)
    if old.exists():
        shutil.rmtree(old)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-old")


def _refuse_foreign(folder: Path, keep: tuple[str, ...]) -> None:
    """A folder without a manifest holds what was kept and a file that was being written; anything else is not ours."""
    there = folder.iterdir() if folder.exists() else ()
    foreign = [path for path in there if not path.name.startswith(".manifest-") and path.name not in keep]
    if foreign:
        raise ValueError(f"{folder}: expected a stage's folder or nothing there, got {foreign[0].name} and no manifest")


def _changes(old: Any, new: Any, where: str = "") -> list[str]:
    """Names of the inputs that differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted({*old, *new})
        return [
            name
            for key in names
            if old.get(key) != new.get(key)
            for name in _changes(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [where]


def _writing_failed(error: BaseException) -> str | None:
    """Why a file could not be written, when that is what an exception is about."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    text = str(error)
    if isinstance(error, SafetensorError | RuntimeError) and any(
        sign in text
        for sign in (
            "No space left",
            "File too large",
            "Disk quota",
            "file write failed",
            "iostream error",
            "unexpected pos",
        )
    ):
        return f"cannot write a model or checkpoint: {text}"
    return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class JsonLinesLog:
    """JSON Lines that grow while work goes on, and survive its end at any moment.

    Rows that are there already are in `rows`. A last line that was cut off in the middle is removed.

    Raises:
        ValueError: a line, other than the last, that is no JSON.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        whole = self.path.read_bytes() if self.path.exists() else b""
        end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: expected JSON: {error}") from None
        if end < len(whole):
            logger.info("%s: removing a line that was cut off", self.path)
            os.truncate(self.path, end)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(rows)
