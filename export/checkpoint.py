"""Checkpoints: safetensors plus JSON in a Hugging Face folder; a run folder holds several.

A checkpoint folder appears under its name only when every byte of it is on disk, and a run's
pointer file is replaced in one step; so whatever kills the process, what was there before is
there still.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from gptrt.architecture import ModelConfig
from gptrt.chat import ChatTemplate
from gptrt.errors import CheckpointError, first_line
from gptrt.format import CONFIG_FILE, GENERATION_CONFIG_FILE, MANIFEST_FILE, TOKENIZER_FILE
from gptrt.schema import decode, read_json
from gptrt.task import Task

from .families import family_for, family_named
from .families.family import with_tied_head
from .families.gpt2 import GPT2
from .files import read_tensors, save_tensors, write_json, written_whole
from .gguf_file import GgufFile, gguf_file
from .gguf_vocabulary import read_chat_template, read_vocabulary, special_ids_of
from .hub import name_of
from .model import GPT, head_parameter
from .parts import parameter_of
from .pickled import pickled_file, read_pickled
from .projection import PROJECTIONS, project, unproject
from .tokenization import (
    SpecialIds,
    load_tokenizer,
    read_special_ids,
    save_tokenizer,
    special_ids,
    tokenizer_in,
)
from .trained_rounding import TrainedRounding
from .weights import PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, fitting, has_weights, read_weights

LINEAGE_FILE = "lineage.json"
TASK_FILE = "task.json"
ROUNDING_FILE, FORMATS_FILE = "quantization.safetensors", "quantization.json"
POINTER_FILE = "checkpoints.json"  # in a run folder: {"best": folder name, "last": folder name}


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory: what `load_checkpoint` gives and `save_checkpoint` writes.

    `state` bears the names of `GPT`; `lineage` says where the weights come from. With `rounding`
    the model learnt to be rounded: its matrices in `state` are rounded, and can learn on from it.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer | None
    lineage: dict[str, str]
    rounding: TrainedRounding | None = None
    special: SpecialIds = field(default_factory=SpecialIds)
    chat_template: ChatTemplate | None = None
    task: Task | None = None  # what it was fine-tuned for

    def words(self) -> Tokenizer:
        """Its tokenizer. Raises CheckpointError if there is none."""
        if self.tokenizer is None:
            raise CheckpointError("a tokenizer.json beside the weights", found="none", do="add it")
        return self.tokenizer

    def model(self, dropout: float = 0.0) -> GPT:
        """The model to train further."""
        model = GPT(self.config, dropout)
        model.load_state_dict(self.state)
        return model

    def frozen(self) -> GPT:
        """The model to compute with: its parameters are the checkpoint's own tensors, no copies."""
        model = GPT.outline(self.config)
        model.load_state_dict(self.state, assign=True)
        if self.config.tied:
            model.lm_head.weight = model.wte.weight
        return model.eval().requires_grad_(False)

    def projected(self) -> Checkpoint:
        """The same with the vocabulary in a basis of its own."""
        config, state = project(self.config, self.state)
        return replace(self, config=config, state=state)

    def plain(self) -> Checkpoint:
        """The same as other software knows it, its vocabulary in the basis of the model."""
        config, state = unproject(self.config, self.state)
        return replace(self, config=config, state=state)

    def alone(self) -> Checkpoint:
        """What the checkpoint computes, and nothing of how it came to be rounded."""
        return replace(self, rounding=None)


def run_pointer(run: Path) -> dict[str, str]:
    """Which checkpoint folders of a run are the best and the last; empty for other folders."""
    path = run / POINTER_FILE
    if not path.is_file():
        return {}
    value = read_json(path, error=CheckpointError)
    names = ("best", "last")
    if not isinstance(value, dict) or not all(isinstance(value.get(n), str) for n in names):
        raise CheckpointError(f"'best' and 'last' in {path}", found=str(value), do="restore it")
    return {name: value[name] for name in names}


def resolve_checkpoint(path: Path) -> Path:
    """The folder that holds the weights: `path` itself, or the best checkpoint of a run."""
    pointer = run_pointer(path)
    return path / pointer["best"] if pointer else path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a run folder of ours, a Hugging Face folder, a GGUF or a pickled file.

    Raises CheckpointError.

    Weights are widened to fp32, the precision in which everything here is computed.
    """
    if path.is_file() and (path.suffix == ".safetensors" or path.name == PICKLED_WEIGHTS_FILE):
        raise CheckpointError(
            "a folder with weights, configuration and tokenizer",
            found=f"the weights alone, {path}",
            do=f"give {path.parent}",
        )
    if (path / MANIFEST_FILE).is_file():
        raise CheckpointError(
            "a checkpoint, with weights as training left them",
            found=f"a bundle, {path}, whose weights are as its graph holds them",
            do="give what it was converted from",
        )
    folder = resolve_checkpoint(path)
    if not has_weights(folder, WEIGHTS_FILE):
        if file := gguf_file(folder):
            return _load_gguf(file)
        if file := pickled_file(folder):
            return _load_pickled(file)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"a checkpoint in {path} (a run folder, or {CONFIG_FILE} with *.safetensors)",
            found="no such folder" if not folder.is_dir() else f"no {CONFIG_FILE}",
            do="give the folder that training wrote, or a Hugging Face model folder",
        )
    raw = read_json(folder / CONFIG_FILE, error=CheckpointError)
    if not isinstance(raw, dict):
        raise CheckpointError(f"an object in {CONFIG_FILE}", found=type(raw).__name__, do="fix it")
    family = family_named(str(raw.get("model_type")))
    with _of_the_right_kinds(folder / CONFIG_FILE):
        config = family.from_json(raw)
        tensors = family.from_tensors(config, dict(read_weights(folder)))
    tokenizer = tokenizer_in(folder, gpt2=family is GPT2)
    found = Checkpoint(
        config,
        fitting(config, tensors, tokenizer, folder),
        tokenizer,
        _read_lineage(folder) or {"source": name_of(path)},
        special=_special_ids(folder, config, tokenizer),
        chat_template=ChatTemplate.read(folder),
        task=_read_task(folder),
    )
    return _with_rounding(found, folder)


@contextmanager
def _of_the_right_kinds(source: Path) -> Iterator[None]:
    """Raises CheckpointError where a block stumbles over values that nothing has decoded yet, or
    over tensors of other shapes."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as e:
        raise CheckpointError(
            f"numbers, lists and tensors as they belong to {source}",
            found=first_line(e),
            do="restore all files from the same model",
        ) from e


def _load_gguf(file: Path) -> Checkpoint:
    found = GgufFile.open(file)
    own = file.parent / TOKENIZER_FILE
    with _of_the_right_kinds(file):
        config, tensors = found.model()
        tokenizer = load_tokenizer(own) if own.exists() else read_vocabulary(found.values, file)
        special, template = special_ids_of(found.values), read_chat_template(found.values)
    state = fitting(config, tensors, tokenizer, file)
    lineage = {"source": file.name}
    return Checkpoint(config, state, tokenizer, lineage, None, special, template)


def _load_pickled(file: Path) -> Checkpoint:
    with _of_the_right_kinds(file):
        config, tensors = read_pickled(file)
        tensors = with_tied_head(config, tensors)
    tokenizer = tokenizer_in(file.parent, gpt2=True)
    state = fitting(config, tensors, tokenizer, file)
    special = special_ids(tokenizer) if tokenizer else SpecialIds()
    return Checkpoint(config, state, tokenizer, {"source": file.name}, special=special)


def _special_ids(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> SpecialIds:
    for name in (GENERATION_CONFIG_FILE, CONFIG_FILE):  # the first overrules the second
        if (folder / name).is_file():
            json = read_json(folder / name, error=CheckpointError)
            found = read_special_ids(json, config.vocab_size) if isinstance(json, dict) else None
            if found is not None:
                return found
    return special_ids(tokenizer) if tokenizer else SpecialIds()


def _with_rounding(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """With what the model learnt of its rounding, and in the basis in which it learnt it: the
    weights beside it are plain, as others read them."""
    if not (folder / FORMATS_FILE).is_file():
        return checkpoint
    formats = read_json(folder / FORMATS_FILE, error=CheckpointError)
    tensors = dict(read_tensors(folder / ROUNDING_FILE))
    if isinstance(formats, dict) and PROJECTIONS & formats.keys():
        checkpoint = checkpoint.projected()
        if left := _basis_of(checkpoint) - set(map(parameter_of, formats)):
            raise CheckpointError(
                f"{', '.join(sorted(left))} in {folder / FORMATS_FILE}, as their basis is there",
                found="formats without them",
                do="restore the checkpoint",
            )
    rounding = TrainedRounding.read(formats, tensors, checkpoint.state, str(folder / FORMATS_FILE))
    state = rounding.in_state(checkpoint.state)
    return replace(checkpoint, state=state, rounding=rounding)


def _basis_of(checkpoint: Checkpoint) -> set[str]:
    """What a vocabulary in a basis of its own consists of: all of it or nothing makes sense."""
    return PROJECTIONS & checkpoint.state.keys() | {head_parameter(checkpoint.config)}


def _read_lineage(folder: Path) -> dict[str, str]:
    file = folder / LINEAGE_FILE
    if not file.is_file():
        return {}
    return decode(
        dict[str, str],
        read_json(file, error=CheckpointError),
        error=CheckpointError,
        source=f"{file}",
    )


def _read_task(folder: Path) -> Task | None:
    file = folder / TASK_FILE
    if not file.is_file():
        return None
    return decode(
        Task, read_json(file, error=CheckpointError), error=CheckpointError, source=f"{file}"
    )


def save_checkpoint(
    checkpoint: Checkpoint, folder: Path, extra: dict[str, Any] | None = None
) -> None:
    """Write a Hugging Face folder in one step. `extra` maps more file names to tensors or JSON."""
    plain = checkpoint.plain()
    family = family_for(plain.config)
    config = family.to_json(plain.config) | {"dtype": "float32"}
    tensors = family.to_tensors(plain.config, plain.state)
    with written_whole(folder, force=True) as temporary:
        save_tensors(tensors, temporary / WEIGHTS_FILE)
        write_json(temporary / CONFIG_FILE, config | checkpoint.special.json())
        write_json(temporary / LINEAGE_FILE, checkpoint.lineage)
        if checkpoint.tokenizer is not None:
            length = checkpoint.config.n_positions
            save_tokenizer(
                *(checkpoint.tokenizer, temporary, length),
                *(checkpoint.special, checkpoint.chat_template),
            )
        if checkpoint.rounding is not None:
            save_tensors(checkpoint.rounding.tensors(), temporary / ROUNDING_FILE)
            write_json(temporary / FORMATS_FILE, checkpoint.rounding.formats_json())
        if checkpoint.task is not None:
            write_json(temporary / TASK_FILE, asdict(checkpoint.task))
        for name, content in (extra or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                save_tensors(content, temporary / name)
            else:
                write_json(temporary / name, content)
