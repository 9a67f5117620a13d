"""What is damaged: the kinds of files that a bundle and a session consist of.

The table at the end names the kinds. Files whose hash agrees are what a faulty converter could
write, or somebody with bad intentions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from gptrt.chat import TEMPLATE_FILE
from gptrt.format import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    GRAPH_DATA_FILE,
    GRAPH_FILE,
    MANIFEST_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)

from .damage import damaged_bytes, damaged_json, flipped, near, odd, spelled

SESSION_FILE = "saved.session"  # beside the files of the bundle

# Given the folder of the intact files: the name of one, and what is to be read instead of it.
Draw = Callable[[Random, Path], tuple[str, bytes]]


@dataclass(frozen=True)
class Kind:
    """One way to damage. Beside being refused, of all results only the `harmless` may be. `rehash`
    says whether the manifest is to agree with the damaged file."""

    draw: Draw
    harmless: tuple[str, ...] = ()
    rehash: bool = False


def kind_of(seed: int) -> str:
    return list(KINDS)[seed % len(KINDS)]


def _always(name: str, damage: Callable[[Random, bytes], bytes]) -> Draw:
    return lambda rng, folder: (name, damage(rng, (folder / name).read_bytes()))


# --- files of a bundle --------------------------------------------------------------------------


def listed(folder: Path) -> dict[str, Any]:
    """What the manifest says of each file."""
    files: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    return files


def _any_file(rng: Random, folder: Path) -> tuple[str, bytes]:
    """The graph and its weights most of all."""
    files = listed(folder)
    graph = [name for name in (GRAPH_FILE, GRAPH_DATA_FILE) if name in files]
    name = rng.choice(graph if rng.random() < 0.7 else list(files))
    return name, damaged_bytes(rng, (folder / name).read_bytes())


def _damaged_graph(rng: Random, data: bytes) -> bytes:
    """Half of the flips are at the ends of the file, where the structure is, not the weights."""
    end = min(len(data), 1 << 14)
    part = rng.choice((range(len(data)), range(end), range(len(data) - end, len(data))))
    count = rng.choice((1, 1, 1, 2, 8))
    return flipped(data, [8 * rng.choice(part) + rng.randrange(8) for _ in range(count)])


def _damaged_manifest(rng: Random, data: bytes) -> bytes:
    way = rng.random()
    if way < 0.25:
        return _consistently_wrong(rng, data)
    return _misnamed(rng, data) if way < 0.35 else damaged_json(rng, data)


def _consistently_wrong(rng: Random, data: bytes) -> bytes:
    """Nothing contradicts anything but the graph."""
    whole = json.loads(data)
    model, cache = whole["model"], whole["cache"]
    if rng.random() < 0.2:
        sizes = {name: model[name] for name in ("vocab_size", "n_positions")}
        whole["model"] = {"architecture": "gpt2", "made_with": "another library", **sizes}
    else:
        pairs = (("n_positions", "max_length"), ("n_layer", "layers"), ("n_kv_head", "kv_heads"))
        name, size = rng.choice((*pairs, ("head_dim", "head_dim")))
        model[name] = cache[size] = max(1, int(near(rng, model[name])))
    return json.dumps({**whole, "golden": []}).encode()


def _misnamed(rng: Random, data: bytes) -> bytes:
    """One more file, which is not there, or is no file, or cannot be."""
    whole = json.loads(data)
    names = ("a" * 300, "\ud800", "a/b", "x", " ", "CON", "\n", "é", MANIFEST_FILE, "a" * 5000)
    entry = {**rng.choice(list(whole["files"].values())), "size": rng.choice((0, 1, 1 << 40))}
    whole["files"][rng.choice(names)] = entry
    return json.dumps(whole).encode()


def _settings(rng: Random, folder: Path) -> tuple[str, bytes]:
    if rng.random() < 0.1:
        return TEMPLATE_FILE, rng.choice((b"\xff\xfe", b"{% if", b"{{ 1 / 0 }}", b"\0", b""))
    names = (CONFIG_FILE, GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE)
    name = rng.choice([name for name in names if name in listed(folder)])
    data = (folder / name).read_bytes()
    if name != TOKENIZER_CONFIG_FILE or rng.random() >= 0.5:
        return name, damaged_json(rng, data)
    named = [{"name": rng.choice(("default", odd(rng))), "template": "{{ messages[0] }}"}]
    template = rng.choice((named, "{{ messages[0]['content'] }}", "{% if", "{{ 1 / 0 }}"))
    return name, spelled(rng, {**json.loads(data), "chat_template": template})


# --- tokenizers ---------------------------------------------------------------------------------

_FILLINGS: dict[str, tuple[Any, ...]] = {
    "@number": (0, 1, 2, 300, 1 << 20, (1 << 32) - 1),
    "@text": ("", "x", "e", "▁", "<|endoftext|>", "é👍", "a" * 300),
    "@regex": ("", "e", "(", ".*", "(?=e)", "(e*)*$", "\\p{L}+|\\s"),
    "@base64": ("", "AAAA", "/////w==", "QAAAAP////8AAAAA"),
}
# Parts of other tokenizers, for where they do not belong. A name in them that begins with @ stands
# for one of the fillings.
_PARTS: dict[str, list[Any]] = json.loads(
    Path(__file__).with_name("tokenizer_parts.json").read_text(encoding="utf-8")
)


def _filled(rng: Random, part: Any) -> Any:
    """With values for what stands for one."""
    if isinstance(part, dict):
        return {key: _filled(rng, value) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(rng, value) for value in part]
    return rng.choice(_FILLINGS[part]) if part in _FILLINGS else part


def _damaged_tokenizer(rng: Random, data: bytes) -> bytes:
    """Half of them are of another make: nothing is wrong with their JSON."""
    return _remade_tokenizer(rng, data) if rng.random() < 0.5 else damaged_json(rng, data)


def _remade_tokenizer(rng: Random, data: bytes) -> bytes:
    """With a part of another, one more token, an option turned, or ids dealt anew."""
    whole = json.loads(data)
    way = rng.random()
    if way < 0.6:
        name = rng.choice(list(_PARTS))
        whole[name] = _filled(rng, rng.choice(_PARTS[name]))
    elif way < 0.75:
        added = {"content": _filled(rng, "@text"), "id": _filled(rng, "@number")}
        for option in ("special", "normalized", "lstrip", "rstrip", "single_word"):
            added[option] = rng.random() < 0.5
        whole["added_tokens"].append(added)
    elif way < 0.9:
        flags = ("byte_fallback", "ignore_merges", "fuse_unk", "dropout", "end_of_word_suffix")
        whole["model"][rng.choice(flags)] = rng.choice((True, False, None, 1.0, 0.0, "x", ""))
    else:
        vocab = whole["model"].get("vocab", {})
        factor, more = rng.choice(((1, 1), (-1, 0), (0, 0), (1 << 18, 0)))
        whole["model"]["vocab"] = {word: factor * n + more for word, n in vocab.items()}
    return json.dumps(whole).encode()


# --- sessions -----------------------------------------------------------------------------------

_MAGIC = b"gptrt-session\n"
_DIGEST = 32  # bytes


def _damaged_session(rng: Random, data: bytes) -> bytes:
    """Its digest computed again, so that all that is behind it gets to see the damage."""
    start, end = len(_MAGIC) + 8, len(data) - _DIGEST
    size = int.from_bytes(data[len(_MAGIC) : start], "little")
    header, values = data[start : start + size], data[start + size : end]
    part = rng.random()
    if part < 0.6:
        header = damaged_json(rng, header)
    elif part < 0.8:
        values = damaged_bytes(rng, values)
    length = len(header)
    if part >= 0.9:
        length = rng.choice((0, 1, size + 1, end, 1 << 40, (1 << 64) - 1))
    body = b"".join((_MAGIC, length.to_bytes(8, "little"), header, values))
    if part >= 0.95:
        body = damaged_bytes(rng, body)
    return body + hashlib.sha256(body).digest()


# --- all ----------------------------------------------------------------------------------------

REHASHED_GRAPH = "graph, its hash agreeing"
# Where a hash agrees, other contents are other contents: that ids are others is no fault then.
_OTHERS = ("same", "other")
KINDS = {
    "manifest": Kind(_always(MANIFEST_FILE, _damaged_manifest), ("same",)),  # which no hash covers
    "tokenizer, its hash agreeing": Kind(
        _always(TOKENIZER_FILE, _damaged_tokenizer), _OTHERS, rehash=True
    ),
    "settings, their hash agreeing": Kind(_settings, _OTHERS, rehash=True),
    "any file, its hash kept": Kind(_any_file),
    REHASHED_GRAPH: Kind(_always(GRAPH_FILE, _damaged_graph), _OTHERS, rehash=True),
    "session": Kind(_always(SESSION_FILE, damaged_bytes)),
    "session, its digest agreeing": Kind(_always(SESSION_FILE, _damaged_session), _OTHERS),
}
