"""Files and folders that are whole or not there: tensors, JSON, and what is made of them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptrt.disk import replaced, sync
from gptrt.errors import CheckpointError, TargetError, first_line


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all in a file. Raises CheckpointError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"safetensors in {file}", found=str(e), do="the file is damaged: restore it"
        ) from e


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises TargetError where the disk does not take them."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as e:
        raise TargetError(
            f"to write {path}", found=first_line(e), do="see that the disk has room"
        ) from e


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(_json(value))


def replace_json(path: Path, value: Any) -> None:
    """Replace a small JSON file in one step."""
    with replaced(path, path.with_name(f".{path.name}.partial")) as stream:
        stream.write(_json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def written_whole(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well.

    A folder that has come to stand there meanwhile is replaced only with `force`, one that is empty
    in any case; of a link, what it points to. Raises TargetError.

    Everything in it is flushed to disk before the rename; on an error it is removed. What a
    killed process leaves behind has a name that starts with a dot and is never read.
    """
    target = Path(os.path.realpath(target))
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        temporary.mkdir(parents=True)
    except OSError as e:
        raise _not_written(target, e) from e
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        old = temporary.with_suffix(".old")
        try:
            if force and target.is_dir():
                target.rename(old)
            temporary.rename(target)  # fails, in one step, where there is more than an empty folder
        except OSError as e:
            raise _not_written(target, e) from e
        shutil.rmtree(old, ignore_errors=True)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():
            for folder in missing:  # made for nothing; one that is not empty stays
                with suppress(OSError):
                    folder.rmdir()


def _not_written(target: Path, error: OSError) -> TargetError:
    return TargetError(
        f"to write {target}", found=error.strerror or str(error), do="choose another place"
    )
