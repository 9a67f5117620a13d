"""What is measured: checkpoints with random weights, and every kind's files made from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import processes
from .peers import OURS, Kind, Peer
from .processes import Environments, WorkerError

_WEIGHTS = {".onnx", ".data", ".onnx_data", ".bin", ".gguf", ".safetensors", ".xml"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder and what its config says."""

    name: str
    path: Path
    family: str
    vocab_size: int
    context: int
    cache_values: int  # of keys and values, for each position

    @property
    def parameters(self) -> int:
        from safetensors import safe_open

        with safe_open(self.path / "model.safetensors", framework="np") as tensors:
            names = list(tensors.keys())
            return sum(prod(tensors.get_slice(name).get_shape()) for name in names)


@dataclass(frozen=True)
class Candidate:
    """One kind of one peer, its files made. `settings` is what its process is started with."""

    peer: Peer
    kind: Kind
    path: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.kind.name}"

    @property
    def bytes(self) -> int:
        """Of all files that hold weights or the graph, tokenizers left out."""
        files = (f for f in self.path.iterdir() if f.suffix in _WEIGHTS)
        return sum(f.stat().st_size for f in files if "tokenizer" not in f.name)


def random_checkpoint(preset: str, work: Path) -> Checkpoint:
    """The shape of a preset with random weights: speed does not look at them."""
    from gptrt_export import checkpoint as ck
    from gptrt_export.model import GPT
    from gptrt_export.presets import load_preset
    from gptrt_export.tokenization import special_ids

    path = work / preset / "checkpoint"
    if not path.exists():
        config = load_preset(preset).model
        tokenizer = numbered_tokenizer(config.vocab_size)
        weights, lineage = GPT(config).state_dict(), {"source": "random"}
        special = special_ids(tokenizer)
        model = ck.Checkpoint(config, weights, tokenizer, lineage, special=special)
        ck.save_checkpoint(model, path)
    return read_checkpoint(preset, path)


def read_checkpoint(name: str, path: Path) -> Checkpoint:
    from gptrt_export.checkpoint import load_checkpoint

    config = load_checkpoint(path).config
    family = json.loads((path / "config.json").read_text())["model_type"]
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return Checkpoint(name, path, family, config.vocab_size, config.n_positions, cache)


def numbered_tokenizer(size: int) -> Any:
    """A byte-level tokenizer padded to `size`: speed needs a vocabulary, not a language."""
    from gptrt_export.tokenization import END_OF_TEXT
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [END_OF_TEXT, *alphabet, *(f"<{i}>" for i in range(len(alphabet) + 1, size))][:size]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


@dataclass(frozen=True)
class Workshop:
    """Makes the files of the kinds in the folder `work` and starts their processes."""

    work: Path
    environments: Environments
    threads: int
    say: Say

    def candidates(
        self,
        checkpoint: Checkpoint,
        peers: list[tuple[Peer, Kind]],
        texts: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> Iterator[Candidate]:
        """Those that could be made, each ready to be started; the others are named with reason.
        `texts` are more settings to build with, by adapter: what calibrates trained weights."""
        for peer, kind in peers:
            if checkpoint.family not in kind.families:
                continue
            try:
                path = self._built(checkpoint, peer, kind, texts)
            except WorkerError as e:
                self.say(f"{peer.name} {kind.name} is left out for {checkpoint.name}: {e}")
                continue
            settings = {
                "path": str(path),
                "threads": self.threads,
                "vocab_size": checkpoint.vocab_size,
                "context": checkpoint.context,
                **kind.options,
            }
            yield Candidate(peer, kind, path, settings)

    def _built(
        self, checkpoint: Checkpoint, peer: Peer, kind: Kind, texts: Mapping[str, Mapping[str, Any]]
    ) -> Path:
        """The folder of a kind's files; made unless it is there. Raises WorkerError."""
        if kind.borrows:
            (lent,) = (k for k in OURS.kinds if k.name == kind.borrows)
            return self._built(checkpoint, OURS, lent, texts)
        folder = self.work.resolve() / checkpoint.name
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{peer.adapter}-{kind.name.replace(' ', '-')}"
        if not out.exists():
            self.say(f"making {peer.name} {kind.name} of {checkpoint.name}")
            given = kind.build | dict(texts.get(peer.adapter, {}))
            task = {
                "checkpoint": str(checkpoint.path.resolve()),
                "out": str(out),
                "settings": given,
            }
            python = self.environments.python(peer)
            command = processes.adapter_command(python, peer.adapter, "build", task)
            try:
                processes.build(command, self.threads, out.with_suffix(".build.log"))
            except WorkerError:
                shutil.rmtree(out, ignore_errors=True)
                raise
        return out

    def command(self, candidate: Candidate) -> list[str]:
        python, adapter = self.environments.python(candidate.peer), candidate.peer.adapter
        return processes.adapter_command(python, adapter, "serve", candidate.settings)

    def log(self, candidate: Candidate, use: str = "serve") -> Path:
        name = candidate.name.replace(" ", "-")
        return candidate.path.parent / f"{name}.{use}.log"
