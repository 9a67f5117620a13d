"""llama.cpp through its C interface: the Python classes over it copy all logits at every token."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from .worker import Rows, Step, main

_LONGEST = 2048  # ids in one call


def build(checkpoint: Path, out: Path, settings: dict[str, Any]) -> None:
    """A GGUF file, quantized by llama.cpp's own tool; with the importance matrix if the kind asks
    for it."""
    import llama_cpp as ll

    from .gguf_file import write_fp32

    out.mkdir()
    full, target = out / "full.gguf", out / "model.gguf"
    write_fp32(checkpoint, full)
    parameters = ll.llama_model_quantize_default_params()
    kind = settings["type"]
    name = "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}"
    parameters.ftype = getattr(ll, name)
    if settings.get("imatrix"):
        parameters.imatrix = _importance(Path(settings["importance"]))
    if ll.llama_model_quantize(str(full).encode(), str(target).encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantize to {kind}")
    full.unlink()


def _importance(path: Path) -> Any:
    """The arrays of a file, as llama.cpp takes them: the last entry has no name."""
    import llama_cpp as ll
    import numpy as np

    with np.load(path) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    entries = (ll.llama_model_imatrix_data * (len(found) + 1))()
    for entry, (name, array) in zip(entries, found.items(), strict=False):
        values = (ctypes.c_float * len(array))(*array.tolist())
        entry.name, entry.data, entry.size = name.encode(), values, len(array)
    return entries


class LlamaCpp:
    def __init__(
        self,
        path: Path,
        threads: int,
        context: int,
        flash_attention: bool = False,
        n_ubatch: int = 512,
    ) -> None:
        import llama_cpp as ll
        import numpy as np

        self._ll, self._np = ll, np
        self._length = context
        self._settings = {
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_batch": _LONGEST,
            "n_ubatch": n_ubatch,
            "flash_attn_type": int(flash_attention),
        }
        ll.llama_backend_init()
        file = str(path / "model.gguf").encode()
        self._model = ll.llama_model_load_from_file(file, ll.llama_model_default_params())
        self._size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._rows = 0
        self._open(rows=1)

    def _open(self, rows: int) -> None:
        """A context for so many rows; the one at hand is kept if it fits, and emptied."""
        ll = self._ll
        if rows != self._rows:
            if self._rows:
                ll.llama_batch_free(self._batch)
                ll.llama_free(self._context)
            parameters = ll.llama_context_default_params()
            parameters.n_ctx, parameters.n_seq_max = self._length * rows, rows
            for name, value in self._settings.items():
                setattr(parameters, name, value)
            self._context = ll.llama_init_from_model(self._model, parameters)
            self._batch = ll.llama_batch_init(_LONGEST, 0, 1)
            self._rows = rows
        # Without its numbers, which are written anew: zeroing all of it would count as reading.
        ll.llama_memory_clear(ll.llama_get_memory(self._context), False)

    def generate(self, rows: Rows, new: int, step: Step) -> None:
        self._open(len(rows))
        length = 0
        for _ in range(new):
            logits = self._decode(rows, length, keep=1)
            length += len(rows[0])
            rows = logits.argmax(axis=-1)[:, None].tolist()
            step()

    def logits(self, ids: list[int]) -> Any:
        self._open(rows=1)
        return self._decode([ids], 0, keep=len(ids))

    def _decode(self, rows: Rows, start: int, keep: int) -> Any:
        """Logits of the last `keep` positions of each row: [rows * keep, vocab_size]."""
        batch, count = self._batch, 0
        for row, ids in enumerate(rows):
            for i, token in enumerate(ids):
                batch.token[count] = token
                batch.pos[count] = start + i
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = row
                batch.logits[count] = i >= len(ids) - keep
                count += 1
        batch.n_tokens = count
        if self._ll.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not decode")
        found = self._ll.llama_get_logits(self._context)
        return self._np.ctypeslib.as_array(found, (len(rows) * keep, self._size))


if __name__ == "__main__":
    main(build, LlamaCpp)
