"""What the README says works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from export.cli import main as gptrt_export

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs_and_writes(capsys) -> None:  # type: ignore[no-untyped-def]
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(" ".join(lines)) > 100
    assert lines[-1].endswith(("length", "stop"))


def test_every_command_and_option_that_the_readme_shows_exists() -> None:
    from gptrt.cli import main as gptrt

    shown = "".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL))
    for line in shown.splitlines():
        program, command, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
        group = {"gptrt": gptrt, "gptrt-export": gptrt_export}[program]
        known = CliRunner().invoke(group, [command, "--help"]).output
        for option in (a for a in arguments if a.startswith("--")):
            assert option in known, line
