"""The file that a session is saved in:

    gptrt-session\\n  length of the header (8 bytes, little-endian)  header  values  sha256

with a header in JSON and the digest over everything before it. It is bound to the model by the
fingerprint of its graph and weights, and read with nothing but bounds checks: no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from gptrt.architecture import MAX_COUNT
from gptrt.disk import replaced
from gptrt.errors import SessionError, TargetError, first_line
from gptrt.schema import bounded, decode

_MAGIC = b"gptrt-session\n"
VERSION = 1
_MAX_HEADER = 1 << 28
_DIGEST = 32  # bytes


@dataclass(frozen=True)
class Header:
    """`ids` are the text; keys and values are of the first `read` of them, `exact` of which passes
    have read."""

    version: int
    model: str
    ids: tuple[int, ...]
    read: int = bounded(0, MAX_COUNT)
    exact: int = bounded(0, MAX_COUNT)

    def faults(self) -> list[str]:
        found = []
        if self.version != VERSION:
            found.append(f"version {self.version}, this gptrt reads {VERSION}")
        if not self.exact <= self.read <= len(self.ids):
            found.append("more is read than there are ids")
        return found


def write_session(path: Path, header: Header, values: bytes) -> None:
    """Beside the target first: an interruption leaves what was there. Raises TargetError."""
    head = json.dumps(asdict(header)).encode()
    parts = (_MAGIC, len(head).to_bytes(8, "little"), head, values)
    draft = path.parent / f"{path.name}.{os.getpid()}.part"
    digest = hashlib.sha256()
    try:
        with replaced(path, draft) as stream:
            for part in parts:
                digest.update(part)
                stream.write(part)
            stream.write(digest.digest())
    except OSError as e:
        raise TargetError(f"to write {path}", found=e.strerror or str(e), do="check it") from e


def read_session(path: Path) -> tuple[Header, bytes]:
    """Header and values. Raises SessionError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        found = e.strerror or str(e)
        raise SessionError(f"a session file at {path}", found=found, do="check the path") from e
    start = len(_MAGIC) + 8
    if not data.startswith(_MAGIC) or len(data) < start + _DIGEST:
        raise damaged(path, "no session file")
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise damaged(path, "another sha256 than it was written with")
    size = int.from_bytes(body[len(_MAGIC) : start], "little")
    if size > min(_MAX_HEADER, len(body) - start):
        raise damaged(path, f"a header of {size} bytes")
    try:
        value = json.loads(body[start : start + size])
    except (ValueError, RecursionError) as e:
        raise damaged(path, first_line(e)) from e
    header = decode(Header, value, error=SessionError, source=f"header of {path}")
    return header, body[start + size :]


def damaged(path: str | os.PathLike[str], found: str) -> SessionError:
    return SessionError(f"a whole session file at {path}", found=found, do="save the session again")
