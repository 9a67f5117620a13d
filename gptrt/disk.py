"""Files that are whole or not there, whatever ends the process or the power; and locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from gptrt.errors import TargetError


@contextmanager
def replaced(path: Path, draft: Path) -> Iterator[IO[bytes]]:
    """A stream into `draft`, a file beside `path` that takes its place when the block ends well. On
    an error it is removed."""
    try:
        with draft.open("w+b") as stream:
            yield stream
            onto_disk(stream)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):  # where nothing could be written there is nothing to remove
            draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def onto_disk(stream: IO[bytes]) -> None:
    """All that was written: until then it is in memory alone."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """The same of a file that others have written; of a folder the names in it, without which a
    power cut may undo a rename."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if folder else nullcontext():  # some file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(stream: IO[bytes], path: Path) -> None:
    """For this process, until the file is closed, however that comes about. Raises TargetError."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise TargetError(
            f"{path} for this run alone", found="another one that writes it", do="wait for its end"
        ) from e
