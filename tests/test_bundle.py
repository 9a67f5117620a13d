"""Wrong bundles are refused, in one line, before anything native reads a byte of them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptrt.cli import main as gptrt
from gptrt.errors import BundleError
from gptrt.format import read_manifest
from gptrt.generator import Generator

from .conftest import assert_refused, rehash, run_cli

Change = Callable[[dict[str, Any]], object]
EditManifest = Callable[[Change], Path]


def assert_both_refuse(bundle: Path, *words: str) -> None:
    """`generate` and `verify` say in one line what was wanted, what was found and what to do."""
    for arguments in (("generate", bundle, "The king"), ("verify", bundle)):
        result = run_cli(gptrt, *arguments)
        assert_refused(result, *words)
        assert result.stdout == ""
        assert result.stderr.count("; ") >= 2, result.stderr


def put(*keys: str | int, value: Any) -> Change:
    """The change that sets one value, however deep."""

    def change(manifest: dict[str, Any]) -> None:
        inner: Any = manifest
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


# --- the folder ---------------------------------------------------------------------------------


def test_what_is_no_bundle_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert_both_refuse(tmp_path / "nothing", "found nothing", "gptrt-export convert")
    assert_both_refuse(tmp_path / "file", "found a file", "gptrt-export convert")
    assert_both_refuse(tmp_path / "empty", "gptrt.json", "not a gptrt bundle")


# --- the files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_graph_that_was_cut_off_is_refused(copied: Path, part: float) -> None:
    graph = copied / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: int(len(whole) * part)])
    assert_both_refuse(copied, "model.onnx", f"{len(whole)} bytes", "copy the bundle again")


def test_every_single_flipped_bit_of_the_graph_is_noticed(copied: Path) -> None:
    graph = copied / "model.onnx"
    whole = graph.read_bytes()
    sampled = random.Random(0).sample(range(8 * len(whole)), 10)
    for bit in (0, *sampled, 8 * len(whole) - 1):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        graph.write_bytes(damaged)
        assert_both_refuse(copied, "model.onnx", "sha256", "copy the bundle again")
    graph.write_bytes(whole)
    assert run_cli(gptrt, "verify", copied).exit_code == 0


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "README.md"])
def test_every_listed_file_must_be_there_as_a_plain_file(copied: Path, name: str) -> None:
    file, elsewhere = copied / name, copied.parent / "elsewhere"
    file.rename(elsewhere)
    assert_both_refuse(copied, name, "no such file")
    file.symlink_to(elsewhere)
    assert_both_refuse(copied, name, "a link")
    file.unlink()
    file.mkdir()
    assert_both_refuse(copied, name, "plain file")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_refused_though_its_hash_is_right(
    copied: Path, content: bytes
) -> None:
    (copied / "tokenizer.json").write_bytes(content)
    rehash(copied, "tokenizer.json")
    assert_both_refuse(copied, "tokenizer.json", "export the bundle again")


@pytest.mark.parametrize("end", ["300", "-1", "true", '"x"', "[0, 300]", "1.5"])
def test_an_end_of_text_id_outside_the_vocabulary_is_refused(copied: Path, end: str) -> None:
    (copied / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')
    rehash(copied, "generation_config.json")
    assert_both_refuse(copied, "eos_token_id", "from 0 to 299")


# --- the manifest -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b'{"format_version": 1,',
        b'{"name": "\xff"}',
        b'{"norm_eps": NaN}',
        b'{"norm_eps": -Infinity}',
        b"[" * 100_000,
        b'{"name": ' * 100_000,
        b"1" * 10_000,
    ],
    ids=lambda content: content[:16].decode(errors="replace"),
)
def test_a_manifest_that_is_not_json_is_refused(copied: Path, content: bytes) -> None:
    (copied / "gptrt.json").write_bytes(content)
    assert_both_refuse(copied, "JSON in", "gptrt.json", "restore the original file")


@pytest.mark.parametrize("content", ["[]", "null", "1", '"text"'])
def test_a_manifest_that_is_no_object_is_refused(copied: Path, content: str) -> None:
    (copied / "gptrt.json").write_text(content)
    assert_both_refuse(copied, "wanted an object", "restore the original file")


def test_a_manifest_too_large_to_be_one_is_not_even_read(copied: Path) -> None:
    with (copied / "gptrt.json").open("r+b") as file:
        file.truncate(65 << 20)
    assert_both_refuse(copied, "gptrt.json", f"{65 << 20}")


WRONG_VALUES: dict[str, tuple[Change, str]] = {
    "negative layers": (put("model", "n_layer", value=-1), "model.n_layer is -1, wanted 1 to 1024"),
    "no vocabulary": (put("model", "vocab_size", value=0), "model.vocab_size is 0"),
    "endless context": (put("model", "n_positions", value=10**18), "model.n_positions is 1000"),
    "endless cache": (put("cache", "max_length", value=10**18), "cache.max_length is 1000"),
    "endless file": (put("files", "model.onnx", "size", value=10**18), "size is 1000"),
    "negative file": (put("files", "model.onnx", "size", value=-1), "size is -1"),
    "bool for int": (put("model", "n_layer", value=True), "model.n_layer is True, wanted int"),
    "int for bool": (put("model", "tied", value=1), "model.tied is 1, wanted bool"),
    "float for int": (put("model", "n_layer", value=2.0), "model.n_layer is 2.0, wanted int"),
    "text for float": (put("model", "norm_eps", value="0"), "model.norm_eps is '0', wanted float"),
    "a float beyond all": (put("model", "norm_eps", value=10**400), "model.norm_eps is 1000"),
    "infinity, spelled out": (put("model", "norm_eps", value=1e308 * 10), "JSON in"),
    "no such activation": (put("model", "activation", value="tanh"), "model.activation is 'tanh'"),
    "a list for an object": (put("model", value=[]), "model is [], wanted an object"),
    "an object for a list": (put("golden", value={}), "golden is {}, wanted a list"),
    "heads that do not divide": (put("model", "n_head", value=6), "n_head 6 is not a multiple"),
    "another cache": (put("cache", "head_dim", value=8), "cache does not match model"),
    "a later format": (put("format_version", value=2), "format_version 2, this gptrt reads 1"),
    "golden id too large": (put("golden", 0, "ids", 0, value=300), "outside the vocabulary"),
    "golden prompt negative": (put("golden", 0, "prompt_ids", 0, value=-1), "outside the vocab"),
    "no hash": (put("files", "model.onnx", "sha256", value=""), "64 hexadecimal digits"),
    "unknown key": (put("extra", value=1), "extra is an unknown key"),
    "unknown inner key": (put("model", "n_expert", value=8), "model.n_expert is an unknown key"),
    "missing key": (lambda manifest: manifest.pop("lineage"), "lineage is missing"),
    "missing inner key": (lambda m: m["model"].pop("n_head"), "model.n_head is missing"),
    "no graph": (lambda m: m["files"].pop("model.onnx"), "files lacks model.onnx"),
}


@pytest.mark.parametrize("what", WRONG_VALUES)
def test_a_wrong_manifest_is_refused_with_key_expected_and_found(
    what: str, edit_manifest: EditManifest
) -> None:
    change, words = WRONG_VALUES[what]
    assert_both_refuse(edit_manifest(change), words, "restore the original file")


def test_a_number_that_json_rounds_to_infinity_is_refused(copied: Path) -> None:
    path = copied / "gptrt.json"
    path.write_text(path.read_text().replace("1e-05", "1e999"))
    assert_both_refuse(copied, "model.norm_eps is inf, wanted 0.0 to 1.0")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "inner/file", "inner\\file", "C:file", "..", ".", "", "\0"]
)
def test_a_file_name_never_leads_out_of_the_bundle(name: str, edit_manifest: EditManifest) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["model.onnx"]

    assert_both_refuse(edit_manifest(change), repr(name), "not a plain file name")


def test_all_faults_of_a_manifest_are_listed_at_once(edit_manifest: EditManifest) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["model"] |= {"n_layer": -1, "vocab_size": 0, "n_expert": 8}
        del manifest["lineage"], manifest["cache"]["dtype"], manifest["cache"]["layers"]
        manifest["golden"][1]["ids"] = ["x"]

    faults = ("model.n_layer", "model.vocab_size", "model.n_expert", "lineage", "cache.layers")
    assert_both_refuse(edit_manifest(change), *faults, "golden[1].ids[0]")


def test_the_python_face_raises_what_the_command_prints(edit_manifest: EditManifest) -> None:
    bundle = edit_manifest(put("format_version", value=2))
    with pytest.raises(BundleError) as caught:
        Generator(bundle)
    assert str(caught.value) in run_cli(gptrt, "verify", bundle).stderr


# --- the order of reading -----------------------------------------------------------------------

_READ = """
import sys
from types import SimpleNamespace
import onnxruntime, tokenizers
from gptrt.errors import GptrtError
from gptrt.generator import Generator
def parser(name, parse):
    def say_and_parse(*given, **options):
        sys.stdout.write(f"parsed by {name}\\n")  # whole: two threads write
        return parse(*given, **options)
    return say_and_parse
from_file = parser("tokenizers", tokenizers.Tokenizer.from_file)
tokenizers.Tokenizer = SimpleNamespace(from_file=from_file)
onnxruntime.InferenceSession = parser("onnxruntime", onnxruntime.InferenceSession)
try:
    Generator(sys.argv[1])
except GptrtError as e:
    print(e)
"""


def _natively_read(bundle: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", _READ, str(bundle)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_changed_file_is_refused_and_no_native_parser_has_seen_a_byte_of_it(
    copied: Path, name: str
) -> None:
    assert sorted(_natively_read(copied).split("\n")) == [
        "",
        "parsed by onnxruntime",
        "parsed by tokenizers",
    ]
    file = copied / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    said = _natively_read(copied)
    assert "sha256" in said
    if name != "model.onnx.data":  # numbers, which no parser reads
        assert "parsed" not in said


# --- the promise --------------------------------------------------------------------------------


def test_a_golden_id_that_is_not_computed_fails_the_check(edit_manifest: EditManifest) -> None:
    right = read_manifest(edit_manifest(lambda _: None)).golden[0].ids
    wrong = (right[2] + 1) % 300
    bundle = edit_manifest(put("golden", 0, "ids", 2, value=wrong))
    result = run_cli(gptrt, "verify", bundle)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"wanted id {wrong} at position 2 after golden prompt 0; found id {right[2]}; " in line
