"""Architectures that `GPT` does not express: another library builds the graph, transformers is the
reference; rounding, the gate and the bundle are ours.

mobius constructs graphs from ONNX functions, optimum traces transformers' own code. Their caches
grow from run to run, which the runtime can do as well (`gptrt.foreign_decoder`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gptrt.architecture import ForeignModel
from gptrt.chat import TEMPLATE_FILE
from gptrt.errors import CheckpointError, DependencyError, GptrtError, OptionError, first_line
from gptrt.format import (
    CONFIG_FILE,
    CONTEXT_KEYS,
    GENERATION_CONFIG_FILE,
    INPUT_IDS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    CacheLayout,
    Quantization,
)
from gptrt.schema import read_json

from .blocks import BlockFormat, BlockMatrix, Float
from .files import write_json
from .nbits import products
from .quantize import Recipe
from .rounding import DATA_FREE
from .settings import Method, Via
from .tokenization import SpecialIds, load_tokenizer, read_special_ids

VIAS: tuple[Via, ...] = get_args(Via)
_PACKAGES = {"mobius": "mobius-onnx", "optimum": "optimum-onnx"}

_BLOCK = 32  # without calibration text small blocks are what there is against errors
_FEWEST = 1 << 12  # weights: what is smaller stays as it is


# --- graphs --------------------------------------------------------------------------------------


def build(via: Via, source: Path) -> ir.Model:
    """The graph of the Hugging Face folder `source` in fp32, weights in it.

    Raises DependencyError without the library, CheckpointError with what it says if it cannot.
    """
    try:
        return _BUILDERS[via](source)
    except ImportError as e:
        raise DependencyError(
            f"{_PACKAGES[via]} for --via {via}", found=str(e), do=f"pip install 'gptrt[{via}]'"
        ) from e
    except GptrtError:
        raise
    except Exception as e:  # whatever it stumbles over
        raise CheckpointError(
            f"a model in {source} that {_PACKAGES[via]} {version(_PACKAGES[via])} can build",
            found=first_line(e),
            do=f"try --via {next(other for other in VIAS if other != via)}",
        ) from e


def _with_mobius(source: Path) -> ir.Model:
    import mobius  # type: ignore[import-not-found]

    built = mobius.build(str(source), dtype="f32")  # portable: the other kernels know less
    model: ir.Model = built["model"]
    if missing := [n for n, v in model.graph.initializers.items() if v.const_value is None]:
        raise CheckpointError(
            f"a weight for each constant of the graph of {source}",
            found=f"none for {', '.join(missing)}",
            do="try --via optimum",
        )
    return model


def _with_optimum(source: Path) -> ir.Model:
    from optimum.exporters.onnx import main_export  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        main_export(
            str(source), output=folder, task="text-generation-with-past", do_validation=False
        )
        model = ir.load(Path(folder) / "model.onnx")
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):  # its file is about to go
                value.const_value = ir.tensor(tensor.numpy().copy(), name=tensor.name)
    return model


_BUILDERS: dict[Via, Callable[[Path], ir.Model]] = {
    "mobius": _with_mobius,
    "optimum": _with_optimum,
}


def reference_of(source: Path) -> Callable[[Tensor], Tensor]:
    """transformers' own model in fp32: ids [batch, length] -> logits [batch, length, vocab]."""
    try:
        import transformers
    except ImportError as e:
        raise DependencyError(
            "transformers, the reference for what it alone can compute",
            found=str(e),
            do="pip install transformers",
        ) from e
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(source, torch_dtype=torch.float32).eval()
    return lambda ids: model(ids).logits


# --- rounding ------------------------------------------------------------------------------------


def check_recipe(recipe: Recipe | None) -> None:
    """Raises OptionError for methods that would need the activations of a model of ours."""
    if recipe is not None and recipe.method is not None and recipe.method not in DATA_FREE:
        raise OptionError(
            f"--via with --method {', '.join(DATA_FREE)}",
            found=recipe.method,
            do="leave it out: k-quant is the default",
        )


def round_matrices(graph: ir.Graph, recipe: Recipe) -> dict[str, BlockMatrix]:
    """Every matrix that activations are multiplied with, and the embedding, by the name of its
    constant. The last product is the head."""
    found: dict[str, BlockMatrix] = {}
    all_products = list(products(graph))
    rows = _embeddings(graph)
    for number, product in enumerate(all_products):
        name = str(product.weight.name)
        weight = _values(product.weight)
        if weight.size >= _FEWEST and name not in found:
            last = number == len(all_products) - 1
            weight = weight if product.transpose else np.ascontiguousarray(weight.T)
            found[name] = _rounded(weight, recipe, head=last, even=name in rows)
    for name, weight in rows.items():
        if weight.size >= _FEWEST and name not in found:
            found[name] = _rounded(weight, recipe, head=True, even=True)
    return found


def _rounded(weight: Float, recipe: Recipe, *, head: bool, even: bool) -> BlockMatrix:
    """The head, and rows that are gathered, have 8 bits unless asked otherwise; the latter no zeros
    of their own, which no kernel reads."""
    bits = (recipe.head_bits or 8) if head else recipe.bits
    method = _method(recipe, bits)
    own_zeros = not even and (recipe.symmetric is False or method in ("k-quant", "hqq"))
    fmt = BlockFormat(bits, recipe.block_size or _BLOCK, symmetric=not own_zeros)
    fmt = fmt.within(weight.shape[1])
    plain = fmt.symmetric or (method == "hqq" and bits == 8)
    return DATA_FREE["nearest" if plain else method](weight, fmt)


def _method(recipe: Recipe, bits: int) -> Method:
    """As asked; else what loses least without calibration text."""
    return recipe.method or ("k-quant" if bits < 8 and not recipe.symmetric else "nearest")


def _embeddings(graph: ir.Graph) -> dict[str, Float]:
    """Tables whose rows are gathered by the ids themselves; others are no weights."""
    return {
        str(node.inputs[0].name): _values(node.inputs[0])
        for node in graph
        if node.op_type == "Gather"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
        and len(node.inputs[0].const_value.shape) == 2
        and node.inputs[1] is not None
        and node.inputs[1].name == INPUT_IDS
    }


def _values(value: ir.Value) -> Float:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def describe_rounding(
    graph: ir.Graph, matrices: dict[str, BlockMatrix], recipe: Recipe | None
) -> Quantization:
    """For the manifest. `graph` is the one before rounding."""
    if recipe is None:
        return Quantization("none", "none", 32, 32, 0, 32.0)
    sizes = {
        name: int(np.prod(value.const_value.shape.numpy()))
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    bits = sum(8 * m.nbytes for m in matrices.values())
    bits += sum(32 * size for name, size in sizes.items() if name not in matrices)
    body = [m for m in matrices.values() if m.format.bits == recipe.bits] or list(matrices.values())
    if not body:
        raise CheckpointError(
            "products with matrices that can be rounded", found="none", do="use --quantize none"
        )
    return Quantization(
        mode=recipe.mode,
        method=_method(recipe, recipe.bits),
        bits=recipe.bits,
        head_bits=recipe.head_bits or 8,
        block_size=body[0].format.block_size,
        bits_per_weight=round(bits / sum(sizes.values()), 4),
    )


# --- what a folder says -------------------------------------------------------------------------


def read_config(source: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder. Raises CheckpointError."""
    config = read_json(source / CONFIG_FILE, error=CheckpointError)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"an object with model_type in {source / CONFIG_FILE}", found="none", do="restore it"
        )
    return config


def context_of(config: dict[str, Any]) -> int:
    """Raises CheckpointError if it is not known how long a context is."""
    context = next((config[key] for key in CONTEXT_KEYS if key in config), None)
    if type(context) is not int or context < 1:
        raise CheckpointError(
            f"the context as {CONTEXT_KEYS[0]} in {CONFIG_FILE}",
            found=repr(context),
            do="write it there: some architectures have no limit of their own",
        )
    return context


def tokenizer_of(source: Path) -> Tokenizer | None:
    """None where there is none."""
    vocabulary = source / TOKENIZER_FILE
    return load_tokenizer(vocabulary) if vocabulary.is_file() else None


def describe_model(config: dict[str, Any], graph: ir.Graph, via: Via) -> ForeignModel:
    """Raises CheckpointError if it is not known how long a context is."""
    context = context_of(config)
    logits = next(value for value in graph.outputs if value.name == "logits")
    size = logits.shape[-1] if logits.shape is not None else None
    vocabulary = size if isinstance(size, int) else config.get("vocab_size", 0)
    package = _PACKAGES[via]
    return ForeignModel(config["model_type"], f"{package} {version(package)}", vocabulary, context)


def describe_cache(model: ForeignModel, graph: ir.Graph) -> CacheLayout:
    """That of the first layer; what others have, the graph says."""
    pasts = [value for value in graph.inputs if str(value.name).startswith("past")]
    if not pasts or pasts[0].shape is None:
        raise CheckpointError("a graph with a cache", found="none", do="try the other --via")
    _, heads, _, width = pasts[0].shape
    heads, width = (size if isinstance(size, int) else 1 for size in (heads, width))
    return CacheLayout(max(1, len(pasts) // 2), heads, width, model.n_positions)


def write_companions(source: Path, folder: Path, vocab_size: int) -> None:
    """The JSON of the original beside the graph; ids that end a text only if they can come up."""
    configs = {name: read_json(source / name, error=CheckpointError) for name in _present(source)}
    found = (read_special_ids(json, vocab_size) for json in reversed(configs.values()))
    special = next((ids for ids in found if ids is not None), SpecialIds())
    for name, json in configs.items():
        write_json(folder / name, json | special.json())
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _present(source: Path) -> list[str]:
    """The second overrules the first."""
    return [n for n in (CONFIG_FILE, GENERATION_CONFIG_FILE) if (source / n).is_file()]
