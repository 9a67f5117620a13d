"""An output that grows batch by batch and survives being ended at any moment.

Beside it stands, until it is whole, `OUTPUT.partial` and what that is made of, in
`OUTPUT.partial.json`. What the latter counts is on the disk; what stands behind that in the former
is a batch that is not whole, and is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from gptrt.disk import lock, onto_disk, replaced, sync
from gptrt.errors import TargetError
from gptrt.schema import bounded, decode, read_json


@dataclass(frozen=True)
class Made:
    """What an output is made of: with the same a run goes on."""

    gptrt: str
    bundle: str  # sha256
    input: str  # sha256
    input_bytes: int
    options: dict[str, str]

    def differences(self, other: Made) -> list[str]:
        """What the other has that is not as here."""
        found = []
        if self.gptrt != other.gptrt:
            found.append(f"gptrt {other.gptrt}")
        if self.bundle != other.bundle:
            found.append("another bundle")
        if (self.input, self.input_bytes) != (other.input, other.input_bytes):
            found.append("another input")
        names = sorted(self.options.keys() | other.options.keys())
        pairs = [(name, other.options.get(name)) for name in names]
        return found + [f"{n} {value}" for n, value in pairs if value != self.options.get(n)]


@dataclass(frozen=True)
class State:
    """How far an output is. With `replaces` it was begun by force, in the place of another."""

    made: Made
    replaces: bool
    rows: int = bounded(0, 1 << 60, default=0)
    bytes: int = bounded(0, 1 << 60, default=0)


@dataclass
class Target:
    """An output in the making: `add` puts a batch into it, `finish` gives it its name."""

    output: Path
    state: State
    begun: bool = True
    finished: bool = False

    @classmethod
    def open(cls, output: Path, made: Made, *, rows: int, force: bool = False) -> Target:
        """One that is new, or that goes on to its `rows` rows; nothing is written yet. Raises
        TargetError for what is taken or was begun otherwise."""
        partial, state_file = beside(output)
        taken = output.exists()
        if output.is_dir():
            raise TargetError(f"a file at {output}", found="a folder", do="choose another output")
        if force or not state_file.exists():
            if not force and (taken or partial.exists()):
                raise TargetError(
                    f"nothing at {output if taken else partial} yet",
                    found="a file",
                    do="choose another output, or replace it with --force",
                )
            return cls(output, State(made, replaces=taken), begun=False)
        value = read_json(state_file, error=TargetError)
        anew = f"start anew with --force, which removes {partial}"
        state = decode(State, value, error=TargetError, source=str(state_file), do=anew)
        if others := made.differences(state.made):
            raise TargetError(
                f"to go on with {partial} as it was begun",
                found=f"it was begun with {', '.join(others)}",
                do=f"give the same again, or {anew}",
            )
        size = partial.stat().st_size if partial.exists() else 0
        whole = State(made, state.replaces, rows, output.stat().st_size if taken else 0)
        if taken and not partial.exists() and state == whole:
            return cls(output, state, finished=True)  # ended between the last two steps
        if size < state.bytes or (taken and not state.replaces):
            raise TargetError(
                f"{partial} of {state.bytes} bytes or more, and nothing at {output}",
                found=f"{size} bytes" + (f" and {output}" if taken else ""),
                do=anew,
            )
        return cls(output, state)

    @contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """What is done so far, open at its end. Raises TargetError, also if another run has it."""
        partial, state_file = beside(self.output)
        with _told(partial):
            if not self.begun:
                _remove(partial)  # before what says how much of it counts
                _write_state(state_file, self.state)
                self.begun = True
            with partial.open("ab") as stream:
                lock(stream, partial)
                self._check_unchanged(stream)
                stream.truncate(self.state.bytes)  # what follows is a batch that is not whole
                yield stream

    def _check_unchanged(self, stream: IO[bytes]) -> None:
        """Between reading the state and locking the file another run may have gone on with it."""
        state_file = beside(self.output)[1]
        value = read_json(state_file, error=TargetError) if state_file.exists() else None
        if value != asdict(self.state) or os.fstat(stream.fileno()).st_size < self.state.bytes:
            raise TargetError(
                f"{self.output} for this run alone",
                found="another one that went on with it",
                do="repeat the command when that has ended",
            )

    def add(self, stream: IO[bytes], data: bytes, rows: int) -> None:
        """So many rows more. They count once they are on the disk."""
        stream.write(data)
        onto_disk(stream)
        done = replace(self.state, rows=self.state.rows + rows, bytes=self.state.bytes + len(data))
        _write_state(beside(self.output)[1], done)
        self.state = done

    def finish(self) -> None:
        """Raises TargetError."""
        partial, state_file = beside(self.output)
        with _told(self.output):
            if not self.finished:
                partial.replace(self.output)
                sync(self.output.parent)
            self.finished = True
            state_file.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses, as a TargetError."""
    try:
        yield
    except OSError as e:
        raise TargetError(
            f"to write {e.filename or path}",
            found=e.strerror or str(e),
            do="see to it and repeat the command: it goes on where it ended",
        ) from e


def beside(output: Path) -> tuple[Path, Path]:
    """Where an output grows, and what says how far it is."""
    return output.with_name(f"{output.name}.partial"), output.with_name(
        f"{output.name}.partial.json"
    )


def _remove(partial: Path) -> None:
    """What is not wanted any more. Raises TargetError if a run is writing it."""
    if partial.exists():
        with partial.open("ab") as stream:
            lock(stream, partial)
        partial.unlink()


def _write_state(path: Path, state: State) -> None:
    with replaced(path, path.with_name(f"{path.name}.part")) as stream:
        stream.write(json.dumps(asdict(state)).encode())
