"""What to store how: a format for every matrix of a model, and the model's matrices in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from gptrt.architecture import ModelConfig
from gptrt.errors import OptionError
from gptrt.format import Quantization, StoredMatrix

from .blocks import BlockFormat, BlockMatrix
from .calibration import Ids, correct_errors
from .learned_rounding import learn_rounding
from .model import GPT, head_parameter, parameter_shapes
from .parts import parameter_of, parts_of, rows_of, shape_of
from .progress import Progress, silent
from .projection import PROJECTIONS, worth_projecting
from .rounding import DATA_FREE, nearest
from .row_bits import FREQUENT_BITS, Counts, RowBits, rows_within, usual_rows
from .settings import Method, Mode

Matrices = dict[str, BlockMatrix]
Table = Sequence[StoredMatrix]
Formats = dict[str, BlockFormat]

BITS: dict[Mode, int] = {"int8": 8, "int4": 4, "int2": 2}
METHODS: tuple[Method, ...] = get_args(Method)
BY_TEXT: dict[Method, Callable[[GPT, Formats, Ids, Progress], Matrices]] = {
    "gptq": correct_errors,
    "learned": learn_rounding,
}
HEAD_BITS = {8: 8, 4: 4, 2: 4}  # of the matrix that gives the logits, by the bits of the others

# Weights that share a scale, by the bits of most matrices, in wide models and in narrow ones. At 8
# bits they are fewer: kernels round the inputs of a product in blocks of the same size, and there
# that costs more than the rounding of the weights. A processor is the faster the longer they are; a
# card has no fast kernel for more than 128.
_BLOCK, _FINE_BLOCK, _LONGEST_ON_CARDS = {8: 64, 4: 256, 2: 128}, 32, 128
_WIDE = 512  # what a model of fewer columns loses to rounding, it has few weights to make good by

# Of a few hundred rows: their size is no matter, their errors are.
_SMALL, _SMALL_BITS = PROJECTIONS | {"wpe.weight"}, 8
_OWN_ZEROS = {"k-quant", "hqq"}  # methods that are nothing without a zero for each block

_VOCABULARY = {"wte.weight", "lm_head.weight"}


@dataclass(frozen=True)
class Recipe:
    """What a user asks for; None is the best choice known.

    `head_bits` is of the vocabulary matrix, the most sensitive one: where it is the embedding too,
    it is stored once. Left out, an eighth of its rows, the most frequent tokens, have 8 bits; or,
    with `bits_per_weight`, a budget over all parameters, as many as it leaves room for, for which
    the rarest may have 2. With `projection` it is rounded in a basis of its own. `half` is
    whether activations are in fp16, as for a card.
    Raises OptionError for a combination that there is not.
    """

    mode: Mode
    method: Method | None = None
    block_size: int | None = None
    head_bits: int | None = None
    symmetric: bool | None = None
    projection: bool | None = None
    bits_per_weight: float | None = None
    half: bool = False

    def __post_init__(self) -> None:
        size = _FINE_BLOCK if self.block_size is None else self.block_size
        for bits in (self.bits, self.bits_of_head):
            BlockFormat(bits, size)
        if self.method in _OWN_ZEROS and self.symmetric:
            raise OptionError(
                f"a method for symmetric blocks: {', '.join(set(METHODS) - _OWN_ZEROS)}",
                found=f"{self.method}, whose blocks have zeros of their own",
                do="leave out --symmetric or choose another --method",
            )
        if self.method == "learned" and self.symmetric is False:
            raise OptionError(
                "learned for symmetric blocks",
                found="--asymmetric",
                do="leave it out or choose another --method",
            )
        if self.method == "hqq" and self.bits == 8:
            raise OptionError("hqq for 4 or 2 bits", found="int8", do="use --method nearest")
        if self.bits_per_weight is not None and not self._splits_vocabulary:
            raise OptionError(
                "--bits-per-weight with int4 or int2, whose vocabulary it chooses the bits of",
                found=self.mode if self.head_bits is None else f"--head-bits {self.head_bits}",
                do="leave one of them out",
            )

    @property
    def bits(self) -> int:
        return BITS[self.mode]

    @property
    def bits_of_head(self) -> int:
        return HEAD_BITS[self.bits] if self.head_bits is None else self.head_bits

    @property
    def chosen_method(self) -> Method:
        """At 8 bits plain rounding loses less than the products' own; below, correction pays."""
        return self.method or ("nearest" if self.mode == "int8" else "gptq")

    @property
    def needs_text(self) -> bool:
        return self.chosen_method in BY_TEXT

    def projects(self, config: ModelConfig) -> bool:
        """Whether the vocabulary is to have a basis of its own, to be rounded in."""
        if config.projected or self.projection is not None:
            return not config.projected and bool(self.projection)
        if self.bits_per_weight is not None:  # which more rows at 8 bits are the better use of
            return False
        return self.bits_of_head < 8 and worth_projecting(config)

    def check(self, config: ModelConfig) -> None:
        """Raises OptionError for a budget that such a model cannot keep to."""
        self.formats(replace(config, projected=config.projected or self.projects(config)))

    def formats(self, config: ModelConfig, counts: Counts | None = None) -> Formats:
        """The format of every matrix, by the name of its parameter in `GPT`, or of its `parts`.

        `counts` [vocab_size] says how often each token is to be expected, for a budget to take bits
        from the rarest.

        Raises OptionError for a budget below what it takes without any row at 8 bits.
        """
        rows, budget = config.vocab_size, self.bits_per_weight
        if budget is None:
            return self._formats(config, usual_rows(rows))
        plain, finest, coarsest = (
            average_bits(config, self._formats(config, vocabulary))
            for vocabulary in (RowBits(0), RowBits(rows), RowBits(0, rows))
        )
        if not budget >= plain:  # nor is NaN
            raise too_few_bits(plain, budget)
        room = (budget - plain, finest - plain, plain - coarsest)
        return self._formats(config, rows_within(rows, *room, self.bits_of_head, counts))

    def _formats(self, config: ModelConfig, vocabulary: RowBits) -> Formats:
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = self.chosen_method not in _OWN_ZEROS
        formats: Formats = {}
        for name, shape in matrix_shapes(config).items():
            # Tables that rows are gathered from are symmetric: one kernel reads both.
            even = symmetric or name in ("wte.weight", "wpe.weight")
            for part, bits in self._bits_of_parts(name, shape, vocabulary).items():
                formats[part] = self._format(config, bits, shape[1], symmetric=even)
        return formats

    def _format(
        self, config: ModelConfig, bits: int, columns: int, *, symmetric: bool
    ) -> BlockFormat:
        """In blocks as long as asked; else in fine ones where the model is narrow, and where it is
        wide in those that are fastest."""
        if self.block_size is not None or config.n_embd < _WIDE:
            return BlockFormat(bits, self.block_size or _FINE_BLOCK, symmetric).within(columns)
        size = _BLOCK[self.bits]
        if self.half:
            return BlockFormat(bits, min(size, _LONGEST_ON_CARDS), symmetric).within(columns)
        return BlockFormat(bits, size, symmetric).fastest_within(columns)

    @property
    def _splits_vocabulary(self) -> bool:
        return self.head_bits is None and self.bits < FREQUENT_BITS

    def _bits_of_parts(
        self, name: str, shape: tuple[int, int], vocabulary: RowBits
    ) -> dict[str, int]:
        if name in _SMALL:
            return {name: _SMALL_BITS}
        if name not in _VOCABULARY:
            return {name: self.bits}
        if not self._splits_vocabulary:
            return {name: self.bits_of_head}
        return vocabulary.parts(name, shape[0], self.bits_of_head)


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[rows, columns] of whatever can have a format of its own: matrices, and parts of those that
    belong to the vocabulary."""
    return {
        part: shape_of(part, shape)
        for name, shape in matrix_shapes(config).items()
        for part in _parts_to_choose_for(name, shape[0])
    }


def _parts_to_choose_for(name: str, rows: int) -> tuple[str, ...]:
    return usual_rows(rows).names(name, rows) if name in _VOCABULARY else (name,)


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[rows, columns] of every matrix of a model; a tied one bears the name of the embedding."""
    shapes = parameter_shapes(config)
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}


def average_bits(config: ModelConfig, formats: Mapping[str, BlockFormat]) -> float:
    """Bits a weight over all parameters, scales included, vectors at their 32 bits. Projections and
    the zeros of padded heads are no parameters of the model: those that it has bear their bits."""
    shapes = matrix_shapes(config)
    bits = 32.0 * _count_parameters(config)
    for name, fmt in formats.items():
        rows, columns = shape_of(name, shapes[parameter_of(name)])
        bits += rows * columns * (fmt.bits_per_weight(columns) - 32)
    return bits / own_parameters(config)


def own_parameters(config: ModelConfig) -> int:
    """How many the model has itself: projections and the zeros of padded heads are not counted."""
    own = replace(config, projected=False, head_dim=config.true_head_dim or config.head_dim)
    return _count_parameters(own)


def _count_parameters(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def quantize_model(
    model: GPT,
    formats: Formats,
    method: Method,
    windows: Ids | None = None,
    progress: Progress = silent,
) -> Matrices:
    """Every matrix of `model` in its format. The methods of `BY_TEXT` need `windows` of calibration
    text [count, length]."""
    if method in BY_TEXT:
        assert windows is not None, "the pipeline has seen to it"
        return BY_TEXT[method](model, formats, windows, progress)
    parameters = dict(model.named_parameters())
    matrices = {}
    for number, (name, fmt) in enumerate(formats.items()):
        progress(number / len(formats), f"rounding {name}")
        # A method with zeros of its own leaves those that must have none to plain rounding.
        rounded = nearest if fmt.symmetric else DATA_FREE[method]
        rows = parameters[parameter_of(name)].detach()[rows_of(name)]
        matrices[name] = rounded(rows.numpy(), fmt)
    return matrices


def too_few_bits(least: float, budget: float) -> OptionError:
    wanted = f"--bits-per-weight of at least {math.ceil(1000 * least) / 1000:.3f}"
    return OptionError(wanted, found=f"{budget}", do="raise the budget")


def mode_of(formats: Formats) -> Mode:
    """The mode whose bits most matrices have."""
    bits = Counter(fmt.bits for name, fmt in formats.items() if name.startswith("h."))
    most = bits.most_common(1)[0][0]
    return next(mode for mode, own in BITS.items() if own == most)


def describe(
    method: str, config: ModelConfig, formats: Formats, matrices: Table = ()
) -> Quantization:
    """What the manifest says of it: the bits of most matrices, and the block that most weights of
    these bits have; the rest by name."""
    mode, shapes = mode_of(formats), matrix_shapes(config)
    sizes = {name: math.prod(shape_of(name, shapes[parameter_of(name)])) for name in formats}
    body = max(
        (f for name, f in formats.items() if name.startswith("h.") and f.bits == BITS[mode]),
        key=lambda fmt: sum(sizes[n] for n, f in formats.items() if f == fmt),
    )
    head = parts_of(head_parameter(config), formats)
    return Quantization(
        mode=mode,
        method=method,
        bits=body.bits,
        head_bits=formats[max(head, key=sizes.__getitem__)].bits,
        block_size=body.block_size,
        bits_per_weight=round(average_bits(config, formats), 4),
        matrices=tuple(matrices),
    )
