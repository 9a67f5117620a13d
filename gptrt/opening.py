"""From a path to what a generator runs: a bundle or a foreign decoder, checked and opened."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from gptrt.architecture import ForeignModel
from gptrt.decoder import Decoder
from gptrt.engine import Device, import_onnxruntime
from gptrt.errors import BundleError, MemoryLimitError, OptionError
from gptrt.format import MANIFEST_FILE, Bundle, check_weights, open_structure
from gptrt.memory import RUNTIME, estimate
from gptrt.task import Task
from gptrt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptrt.foreign import ForeignFolder
    from gptrt.foreign_decoder import ForeignDecoder

StrPath = str | os.PathLike[str]
T = TypeVar("T")

_EMBEDDED = "tales"


@dataclass(frozen=True)
class Parts:
    """What runs a model, how it reads and writes text, and what it was fine-tuned for."""

    decoder: Decoder | ForeignDecoder
    tokenizer: Tokenizer
    task: Task | None = None


def open_parts(
    path: StrPath | None, *, device: Device, threads: int | None, cuda_graphs: bool = False
) -> Parts:
    """Of the bundle or the foreign decoder at `path`; of the embedded bundle, if it is None."""
    if (folder := foreign_folder(path)) is not None:
        from gptrt import foreign_decoder

        _check_native(cuda_graphs)
        return Parts(*foreign_decoder.open_parts(folder, device=device, threads=threads))
    bundle = open_structure(bundle_path(path))
    import_onnxruntime()
    opening = _Beside(
        lambda: open_decoder(bundle, device=device, threads=threads, cuda_graphs=cuda_graphs)
    )
    try:  # meanwhile; the tokenizer last, as its library keeps Python's lock while it reads
        check_weights(bundle)
        tokenizer = Tokenizer.open(bundle)
    finally:
        opening.join()  # a process that ends while onnxruntime opens a graph aborts
    return Parts(opening.result(), tokenizer, bundle.manifest.task)


def left_for_caches(limit: int, path: StrPath | None, draft: StrPath | None) -> int:
    """Of a limit in bytes what a bundle and its draft leave. Raises OptionError for what is no
    limit, MemoryLimitError where nothing is left."""
    if type(limit) is not int:
        raise OptionError(
            "memory_limit= a whole number of bytes", found=repr(limit)[:60], do="correct it"
        )
    left = limit - _without_caches(path) - (0 if draft is None else _as_draft(draft))
    if left <= 0:
        raise MemoryLimitError(
            "memory_limit to leave room beside weights and libraries",
            found=f"{-left:,} bytes too few",
            do="raise it, or use a smaller bundle",
        )
    return left


def _without_caches(path: StrPath | None) -> int:
    """What a bundle takes before it continues anything; of a foreign decoder its files, as nothing
    tells how they are packed, and the libraries."""
    if (folder := foreign_folder(path)) is not None:
        return RUNTIME + folder.weights_bytes
    needs = estimate(bundle_path(path))
    return needs.total - needs.cache


def _as_draft(path: StrPath) -> int:
    """What a draft takes beside the bundle that it guesses for, its cache included: of a foreign
    one its files."""
    if (folder := foreign_folder(path)) is not None:
        return folder.weights_bytes
    needs = estimate(path)
    return needs.total - needs.runtime


class _Beside(threading.Thread, Generic[T]):
    """A function in a thread of its own, from now on."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._error: BaseException | None = None
        self._value: list[T] = []
        self.start()

    def run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as e:
            self._error = e

    def result(self) -> T:
        """What it gives or raises, once it does."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value.pop()


def open_decoder(
    bundle: Bundle,
    *,
    device: Device = "auto",
    threads: int | None = None,
    cuda_graphs: bool = False,
) -> Decoder | ForeignDecoder:
    """The decoder that runs a bundle: ours, or where another library built the graph, one for any
    decoder. Raises what `Decoder` does."""
    if isinstance(bundle.manifest.model, ForeignModel):
        from gptrt.foreign import folder_of
        from gptrt.foreign_decoder import ForeignDecoder

        _check_native(cuda_graphs)
        return ForeignDecoder(folder_of(bundle), device=device, threads=threads)
    return Decoder(bundle, device=device, threads=threads, cuda_graphs=cuda_graphs)


def _check_native(cuda_graphs: bool) -> None:
    if cuda_graphs:
        raise OptionError(
            "a bundle of gptrt-export for cuda_graphs",
            found="a decoder that another tool exported",
            do="leave cuda_graphs out",
        )


def check_same_words(ours: Parts, draft: Parts) -> None:
    """Raises OptionError for a draft whose ids mean something else."""
    sizes = (ours.decoder.vocab_size, draft.decoder.vocab_size)
    if sizes[0] != sizes[1] or ours.tokenizer.words() != draft.tokenizer.words():
        raise OptionError(
            f"a draft with the vocabulary of the bundle, {sizes[0]} entries",
            found=f"{sizes[1]} entries" if sizes[0] != sizes[1] else "other entries",
            do="use a draft that was trained with the same tokenizer",
        )


def foreign_folder(path: StrPath | None) -> ForeignFolder | None:
    """The decoder of another library at `path`; None where a bundle of ours would be. Raises
    BundleError for one that lacks something."""
    if path is None or (Path(path) / MANIFEST_FILE).is_file():
        return None
    from gptrt import foreign  # an import that bundles need not wait for

    return foreign.open_foreign(path) if foreign.is_foreign(path) else None


def bundle_path(path: StrPath | None) -> Path:
    """The folder that was named, or that of the embedded default. Raises BundleError if that is
    not there."""
    return embedded_bundle() if path is None else Path(path)


def embedded_bundle() -> Path:
    """Where the default bundle is: in the installed data package, or in the source tree.

    Raises BundleError if it is in neither.
    """
    spec = importlib.util.find_spec("gptrt_models")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    roots.append(Path(__file__).parents[1] / "models")
    for folder in (root / _EMBEDDED for root in roots):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    raise BundleError(
        "the embedded default bundle", found="none installed", do="give the folder of a bundle"
    )
