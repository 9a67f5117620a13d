"""Offline: no socket and no file written, seen by Python and by the system itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptrt.errors import BundleError
from gptrt.opening import embedded_bundle

_COMMAND = "from gptrt.cli import main; main()"


@pytest.fixture(scope="module")
def words(request: pytest.FixtureRequest) -> list[str]:
    """What follows `gptrt`: the embedded bundle where there is one."""
    try:
        embedded_bundle()
        bundle = []
    except BundleError:
        bundle = [str(request.getfixturevalue("bundle"))]
    return ["generate", *bundle, "Once upon a time", "--max-new-tokens", "8"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def fresh(home: Path) -> dict[str, str]:
    """The environment of a user whose every folder for data is empty.

    Python's own cache of compiled files is off: installing a package fills it, not running it.
    """
    places = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    kept |= dict.fromkeys((*places, "TMPDIR", "TEMP", "TMP"), str(home))
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}


def python(home: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *words]
    return subprocess.run(command, env=fresh(home), capture_output=True, text=True)


# --- as Python sees it --------------------------------------------------------------------------

_AUDITED = """
import os, sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
            "os.truncate", "os.chmod", "subprocess.Popen", "os.system", "os.exec", "os.fork"}

def watch(event, args):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "shutil.")):
        sys.stderr.write(f"SEEN {event}\\n")
    elif event in CHANGING or event.startswith(("tempfile.", "sqlite3.")):
        sys.stderr.write(f"SEEN {event}\\n")
    elif event == "open":
        path, mode, flags = args
        if (mode and set(mode) & set("wax+")) or flags & WRITING:
            sys.stderr.write(f"SEEN open {path!r} {mode} {flags:#x}\\n")

sys.addaudithook(watch)
"""


def test_generating_opens_no_socket_and_no_file_for_writing(home: Path, words: list[str]) -> None:
    done = python(home, _AUDITED + _COMMAND, *words)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("sin", "seen"),
    [
        ("import socket; socket.socket()", "socket.__new__"),
        ("import pathlib; pathlib.Path.home().joinpath('x').write_text('')", "open"),
        ("import os; os.close(os.open(os.environ['HOME'] + '/x', os.O_CREAT))", "open"),
        ("import tempfile; tempfile.TemporaryDirectory().cleanup()", "tempfile.mkdtemp"),
    ],
)
def test_the_watch_sees_what_it_should(home: Path, sin: str, seen: str) -> None:
    assert f"SEEN {seen}" in python(home, _AUDITED + sin).stderr


def test_generating_leaves_nothing_behind(home: Path, words: list[str]) -> None:
    done = python(home, _COMMAND, *words)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


# --- as the system sees it: native code too ------------------------------------------------------


def _traced(home: Path, log: Path, *command: str) -> list[str]:
    """System calls of a command and of all its children that open, change or connect."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    calls = "trace=%network,openat,?open,?creat,?mkdir,mkdirat,?rename,?renameat,renameat2"
    calls += ",?unlink,unlinkat"  # those with a ? are not on every processor
    traced = [strace, "-f", "-qq", "-s", "400", "-e", calls, "-o", str(log), *command]
    done = subprocess.run(traced, env=fresh(home), capture_output=True, text=True)
    if "ptrace" in done.stderr and not log.read_text():
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def _forbidden(calls: list[str]) -> list[str]:
    network = re.compile(r"\bAF_INET6?\b")
    change = re.compile(r"\b(mkdir|mkdirat|rename|renameat|renameat2|unlink|unlinkat|creat)\(")
    write = re.compile(r'open(?:at)?\(.*?"(?!/dev/|/proc/).*?".*\bO_(?:WRONLY|RDWR|CREAT)\b')
    return [c for c in calls if network.search(c) or change.search(c) or write.search(c)]


def test_the_system_sees_no_network_and_no_file_for_writing(
    home: Path, tmp_path: Path, words: list[str]
) -> None:
    calls = _traced(home, tmp_path / "calls", sys.executable, "-c", _COMMAND, *words)
    assert any("model.onnx" in call and "O_RDONLY" in call for call in calls)
    assert _forbidden(calls) == []


def test_the_trace_shows_what_it_should(home: Path, tmp_path: Path) -> None:
    sins = """
import os, socket
socket.socket().close()
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
os.mkdir(os.environ["HOME"] + "/folder")
open(os.environ["HOME"] + "/file", "w").close()
open("/dev/null", "w").close()
"""
    calls = _traced(home, tmp_path / "calls", sys.executable, "-c", sins)
    assert len(_forbidden(calls)) == 4


# --- what an application did before --------------------------------------------------------------

# The variable is set during the import, so that this test itself stays offline.
_EARLY = """
import os, warnings
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
if {forget}:
    del os.environ["ORT_DISABLE_TELEMETRY"]
from gptrt.doctor import diagnose
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    diagnose()
print(*(f"{{w.category.__name__}}: {{w.message}}" for w in caught), sep="\\n")
"""


def test_an_application_that_imported_onnxruntime_too_early_is_warned(home: Path) -> None:
    (warning,) = python(home, _EARLY.format(forget=True)).stdout.splitlines()
    assert warning.startswith("RuntimeWarning: onnxruntime was imported before gptrt")
    assert "ORT_DISABLE_TELEMETRY=1" in warning
    assert "set the variable before that import" in warning


def test_an_application_that_set_the_variable_first_is_not_warned(home: Path) -> None:
    done = python(home, _EARLY.format(forget=False))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_telemetry_is_off_before_onnxruntime_is_imported(home: Path, words: list[str]) -> None:
    watch = """
import os, sys
def watch(event, args):
    if event == "import" and args[0] == "onnxruntime":
        print("at its import:", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.addaudithook(watch)
"""
    done = python(home, watch + _COMMAND, *words)
    assert done.stdout.startswith("at its import: 1\n")
