"""Processes of the peers: where their Pythons are, how they are started, asked and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peers import Peer

_ADAPTERS = f"{__package__}.peers"
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


class WorkerError(Exception):
    """A process that ended instead of answering."""


@dataclass(frozen=True)
class Environments:
    """Folders of virtual environments, one a peer; where there is none, this one serves."""

    folder: Path | None

    def python(self, peer: Peer) -> str:
        if self.folder is not None:
            own = self.folder.resolve() / peer.adapter / "bin" / "python"
            if own.is_file():
                return str(own)
        return sys.executable

    def versions(self, peer: Peer) -> dict[str, str] | None:
        """Of the packages that matter; None where the peer is not installed."""
        command = [self.python(peer), "-c", _VERSIONS, *peer.packages]
        found = subprocess.run(command, capture_output=True, text=True, env=_environment(1))
        if found.returncode:
            return None
        versions = json.loads(found.stdout)
        return {name: versions[name] for name in peer.packages[: peer.shown]}

    def install(self, peer: Peer) -> None:
        """Make the environment of a peer with pip."""
        assert self.folder is not None
        place = self.folder / peer.adapter
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", *peer.needs], check=True)
        if peer.without:
            subprocess.run([*pip, "uninstall", "--yes", *peer.without], check=True)


@dataclass(frozen=True)
class Worker:
    """A process that answers lines of JSON with lines of JSON. `loaded` is its first line."""

    process: subprocess.Popen[str]
    log: Path
    loaded: dict[str, Any]

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.receive()

    def send(self, **request: Any) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(_last_line(self.log)) from None

    def receive(self) -> dict[str, Any]:
        return _read(self.process, self.log)


@contextmanager
def started(command: list[str], threads: int, log: Path) -> Iterator[Worker]:
    """A worker that has loaded its model. Raises WorkerError."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(threads),
        )
    try:
        yield Worker(process, log, _read(process, log))
    finally:
        process.kill()
        process.communicate()


def _read(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise WorkerError(_last_line(log))
    answer: dict[str, Any] = json.loads(line)
    return answer


def adapter_command(python: str, adapter: str, command: str, settings: dict[str, Any]) -> list[str]:
    return [python, "-m", f"{_ADAPTERS}.{adapter}", command, json.dumps(settings)]


def first_token(
    command: list[str], request: dict[str, Any], threads: int, log: Path
) -> dict[str, float]:
    """A fresh process: seconds from its start to its first id, of which to load; peak memory."""
    began = time.perf_counter()
    with started(command, threads, log) as worker:
        worker.send(**request, tell_first=True)
        worker.receive()
        seconds = time.perf_counter() - began
        peak = worker.receive()["peak_mb"]
        return {"cold": seconds, "load": worker.loaded["load_s"], "memory": peak}


def build(command: list[str], threads: int, log: Path) -> None:
    """Run an adapter's `build`. Raises WorkerError."""
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=_environment(threads))
    if done.returncode:
        raise WorkerError(_last_line(log))


def _environment(threads: int) -> dict[str, str]:
    """The same for every peer; nothing may look for a network."""
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    # pip compiles what it installs. Of a checkout Python does it at the first start, if it may: or
    # else at every one.
    found = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
    return found | fixed


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it ended without a word'} ({log})"
