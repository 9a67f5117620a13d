"""What an import costs, seen in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "optimum", "click", "tokenizers"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "statement", ["import gptrt", "from gptrt import Generator, GenerationConfig, Decoder"]
)
def test_importing_gptrt_pulls_nothing_heavy(statement: str) -> None:
    assert not modules_after(statement) & HEAVY


def test_importing_gptrt_does_not_even_pull_numpy() -> None:
    assert "numpy" not in modules_after("import gptrt")


def test_the_runtime_never_needs_the_factory() -> None:
    loaded = modules_after("import gptrt.cli, gptrt.bench, gptrt.doctor, gptrt.scoring")
    assert not loaded & {"torch", "onnx", "onnxruntime", "transformers", "export", "gptrt_export"}


def test_presets_are_listed_without_pytorch() -> None:
    loaded = modules_after("import export.cli\nexport.cli.main(['presets'], standalone_mode=False)")
    assert "export" in loaded and "torch" not in loaded


def test_the_public_face_is_complete() -> None:
    import gptrt

    assert all(getattr(gptrt, name) is not None for name in gptrt.__all__)
    assert set(gptrt.__all__) | {"__version__"} <= set(dir(gptrt))
    with pytest.raises(AttributeError, match="nothing_here"):
        gptrt.nothing_here  # noqa: B018
