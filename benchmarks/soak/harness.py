"""One damaged file: read it as a user's program would, and judge what came of it.

The oracle is what the intact files give: greedy ids, and those with which a saved session goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from gptrt.errors import GptrtError
from gptrt.format import MANIFEST_FILE, describe_file
from gptrt.generator import Generator
from gptrt.session import Session

from .kinds import KINDS, SESSION_FILE, kind_of
from .workload import TEXT, open_generator

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """Of one case: "refused" with an error of gptrt's, the "same" ids as of the intact files, or
    "other" ones; and what must not be, an "untyped" error, threads that are still "running" when
    all is over, "crashed", "hung"."""

    result: Literal["refused", "same", "other", "untyped", "running", "crashed", "hung"]
    what: str = ""


class Harness:
    """Intact files in a folder of their own, and what they give."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self._intact = Path(shutil.copytree(bundle, folder / "intact"))
        self._scratch = folder / "damaged"
        self._generator = open_generator(bundle)
        with Session(self._generator) as session:
            session.append(TEXT)
            session.generate(max_new_tokens=4)
            session.save(self._intact / SESSION_FILE)
        self._answer = self._ask(self._generator)
        self._continuation = self._go_on(self._intact)

    def outcome(self, seed: int) -> Outcome:
        """Of the case that a seed stands for; the same each time."""
        kind = KINDS[kind_of(seed)]
        name, data = kind.draw(Random(seed), self._intact)
        folder = self._scratch
        shutil.copytree(self._intact, folder, copy_function=os.link)  # bundles may be large
        try:
            _replace(folder / name, data)
            if kind.rehash:
                _rehash(folder, name)
            if name == SESSION_FILE:
                return judged(self._continuation, lambda: self._go_on(folder))
            return judged(self._answer, lambda: self._ask(open_generator(folder)))
        finally:
            shutil.rmtree(folder)

    def _ask(self, generator: Generator) -> Ids:
        """Greedy ids, and a look at all else that files decide."""
        with suppress(GptrtError):  # most have no chat template
            generator.chat_prompt([{"role": "user", "content": "Hello."}])
        found = generator.complete(TEXT, max_new_tokens=4)
        generator.tokenizer.decode(found.ids)
        if generator.decoder.context > self._generator.decoder.context:  # than there really is
            generator.complete([1] * (self._generator.decoder.context + 1), max_new_tokens=2)
        return found.ids

    def _go_on(self, folder: Path) -> Ids:
        """What the session file is continued with."""
        with Session.load(self._generator, folder / SESSION_FILE) as session:
            found = session.complete(max_new_tokens=4)
            session.rewind(len(session) // 2)
            session.append([1, 2])
            return found.ids


def _replace(path: Path, data: bytes) -> None:
    """By a new file: the old one is the intact one too."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _rehash(folder: Path, name: str) -> None:
    """The manifest, to agree with a file."""
    entry = describe_file(folder / name)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    _replace(folder / MANIFEST_FILE, json.dumps(manifest).encode())


# --- the verdict --------------------------------------------------------------------------------


def judged(wanted: Ids, run: Callable[[], Ids]) -> Outcome:
    before = set(threading.enumerate())
    outcome = _result(wanted, run)
    running = set(threading.enumerate()) - before
    for thread in running:
        thread.join()  # or it would be taken for one of the next case
    if running and outcome.result != "untyped":
        names = ", ".join(sorted({type(thread).__name__ for thread in running}))
        return Outcome("running", f"{names} after it was {outcome.result}")
    return outcome


def _result(wanted: Ids, run: Callable[[], Ids]) -> Outcome:
    try:
        found = run()
    except GptrtError as e:
        return _printed(e)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in Rust is no Exception
        return Outcome("untyped", _where(e))
    return Outcome("same" if found == wanted else "other")


def _printed(error: GptrtError) -> Outcome:
    """An error that cannot be written into a log is of little use."""
    try:
        str(error).encode()
    except UnicodeEncodeError as e:
        return Outcome("untyped", f"UnicodeEncodeError in what {_where(error)}: {e}")
    return Outcome("refused")


def _where(error: BaseException) -> str:
    """The exception, and the function of gptrt out of which it came."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent.name == "gptrt"]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "no file of gptrt"
    return f"{type(error).__name__} in {place}: {ascii(str(error))[:200]}"
