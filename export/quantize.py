"""What to store how: a format for every matrix of a model, and the model's matrices in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from gptrt.errors import OptionError
from gptrt.format import ModelConfig, Quantization, StoredMatrix

from .blocks import BlockFormat, BlockMatrix
from .calibration import Ids, correct_errors
from .model import GPT
from .progress import Progress, silent
from .rounding import DATA_FREE, Method, nearest

Mode = Literal["int8", "int4", "int2"]
BITS: dict[Mode, int] = {"int8": 8, "int4": 4, "int2": 2}
METHODS: tuple[Method, ...] = get_args(Method)
HEAD_BITS = {8: 8, 4: 8, 2: 4}  # of the matrix that gives the logits, by the bits of the others
# Kernels round the inputs of a product in blocks of the same size: at 8 bits, block 128, that costs
# five times what the rounding of the weights does, at 4 bits less than it.
BLOCK_SIZE = {8: 32, 4: 128, 2: 128}

_POSITION_BITS = 8  # a table of a few hundred rows: its size is no matter, its errors are
_OWN_ZEROS = {"k-quant", "hqq"}  # methods that are nothing without a zero for each block

_TABLES = {"wte.weight", "lm_head.weight", "wpe.weight"}

Matrices = dict[str, BlockMatrix]
Table = Sequence[StoredMatrix]
Formats = dict[str, BlockFormat]


@dataclass(frozen=True)
class Recipe:
    """What a user asks for; None is the best choice known.

    `head_bits` is of the vocabulary matrix, the most sensitive one: where it is the embedding too,
    it is stored once. Raises OptionError for a combination that there is not.
    """

    mode: Mode
    method: Method | None = None
    block_size: int | None = None
    head_bits: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        BlockFormat(self.bits, self.size)
        BlockFormat(self.bits_of_head, self.size)
        if self.method in _OWN_ZEROS and self.symmetric:
            raise OptionError(
                f"a method for symmetric blocks: {', '.join(set(METHODS) - _OWN_ZEROS)}",
                found=f"{self.method}, whose blocks have zeros of their own",
                do="leave out --symmetric or choose another --method",
            )
        if self.method == "hqq" and self.bits == 8:
            raise OptionError("hqq for 4 or 2 bits", found="int8", do="use --method nearest")

    @property
    def bits(self) -> int:
        return BITS[self.mode]

    @property
    def size(self) -> int:
        return BLOCK_SIZE[self.bits] if self.block_size is None else self.block_size

    @property
    def bits_of_head(self) -> int:
        return self.head_bits or HEAD_BITS[self.bits]

    @property
    def chosen_method(self) -> Method:
        """At 8 bits plain rounding loses less than the products' own; below, correction pays."""
        return self.method or ("nearest" if self.mode == "int8" else "gptq")

    @property
    def needs_text(self) -> bool:
        return self.chosen_method == "gptq"

    def formats(self, config: ModelConfig) -> Formats:
        """The format of every matrix, by the name of its parameter in `GPT`."""
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = self.chosen_method not in _OWN_ZEROS
        body = BlockFormat(self.bits, self.size, symmetric)
        special = {  # tables that rows are gathered from are symmetric: one kernel reads both
            "lm_head.weight": BlockFormat(self.bits_of_head, self.size, symmetric),
            "wte.weight": BlockFormat(self.bits_of_head, self.size),
            "wpe.weight": BlockFormat(_POSITION_BITS, self.size),
        }
        return {
            name: special.get(name, body).within(columns)
            for name, (_, columns) in matrix_shapes(config).items()
        }


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[rows, columns] of every matrix of a model; a tied one bears the name of the embedding."""
    with torch.device("meta"):
        named = dict(GPT(config).named_parameters())
    return {name: (p.shape[0], p.shape[1]) for name, p in named.items() if p.ndim == 2}


def average_bits(config: ModelConfig, formats: Mapping[str, BlockFormat]) -> float:
    """Bits a weight over all parameters, scales included, vectors at their 32 bits."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(config).named_parameters()}
    bits = sum(
        size * (formats[name].bits_per_weight if name in formats else 32)
        for name, size in sizes.items()
    )
    return bits / sum(sizes.values())


def quantize_model(
    model: GPT,
    formats: Formats,
    method: Method,
    windows: Ids | None = None,
    progress: Progress = silent,
) -> Matrices:
    """Every matrix of `model` in its format. gptq needs `windows` of calibration text
    [count, length]."""
    if method == "gptq":
        assert windows is not None, "the pipeline has seen to it"
        return correct_errors(model, formats, windows, progress)
    parameters = dict(model.named_parameters())
    matrices = {}
    for number, (name, fmt) in enumerate(formats.items()):
        progress(number / len(formats), f"rounding {name}")
        # A method with zeros of its own leaves those that must have none to plain rounding.
        rounded = nearest if fmt.symmetric else DATA_FREE[method]
        matrices[name] = rounded(parameters[name].detach().numpy(), fmt)
    return matrices


def mode_of(formats: Formats) -> Mode:
    """The mode whose bits most matrices have."""
    bits = Counter(fmt.bits for name, fmt in formats.items() if name not in _TABLES)
    most = bits.most_common(1)[0][0]
    return next(mode for mode, own in BITS.items() if own == most)


def describe(
    mode: Mode, method: str, config: ModelConfig, formats: Formats, matrices: Table = ()
) -> Quantization:
    """What the manifest says of it: bits and block of most weights, the rest by name."""
    sizes = matrix_shapes(config)
    body = max(
        (fmt for name, fmt in formats.items() if name not in _TABLES),
        key=lambda fmt: sum(math.prod(sizes[n]) for n, f in formats.items() if f == fmt),
    )
    return Quantization(
        mode=mode,
        method=method,
        bits=body.bits,
        head_bits=formats["wte.weight" if config.tied else "lm_head.weight"].bits,
        block_size=body.block_size,
        bits_per_weight=round(average_bits(config, formats), 4),
        matrices=tuple(matrices),
    )
