"""On a card: a bundle computes there what it computes on the processor, and behaves alike."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import numpy as np
import pytest

from export.options import ConvertOptions
from export.pipeline import convert, verify
from export.runs import Run
from gptrt.config import GenerationConfig
from gptrt.cuda import Cuda
from gptrt.decoder import Decoder
from gptrt.doctor import diagnose
from gptrt.engine import Memory, import_onnxruntime
from gptrt.errors import OptionError
from gptrt.format import open_bundle
from gptrt.generator import Generator
from gptrt.interrupt import Cancellation
from gptrt.session import Session


def _card() -> bool:
    """Whether onnxruntime has CUDA and something to run it on."""
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        return False
    return any(f.what == "cuda" and f.found == "loads" for f in diagnose())


on_a_card = pytest.mark.skipif(not _card(), reason="no card, or an onnxruntime without CUDA")
_KINDS = {
    "fp16": ConvertOptions("fp16"),
    "int8": ConvertOptions("int8", activations="fp16", block_size=32),
    "int4": ConvertOptions("int4", activations="fp16", block_size=32, allow_loss=True),
}


@pytest.fixture(scope="module", params=list(_KINDS))
def half(
    request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run as a bundle with activations in fp16."""
    path = tmp_path_factory.mktemp("half") / request.param
    convert(run.path, path, _KINDS[request.param])
    return path


def test_activations_in_fp16_lose_next_to_nothing_where_matrices_are_rounded(half: Path) -> None:
    fidelity = open_bundle(half).manifest.fidelity
    assert fidelity is not None
    assert fidelity.perplexity_ratio < 1.01
    assert open_bundle(half).manifest.cache.dtype == "float16"


class _HostCuda(Cuda):
    """The same copies, in the processor's memory."""

    def __init__(self) -> None:
        pass

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], width: int, count: int
    ) -> None:
        for row in range(count):
            ctypes.memmove(target[0] + row * target[1], source[0] + row * source[1], width)


def test_positions_are_copied_by_address_as_they_are_in_arrays() -> None:
    random, cuda = np.random.default_rng(0), _HostCuda()
    arrays = [random.random((3, 2, size, 4)).astype(np.float16) for size in (7, 9)]
    there, other = (
        Memory("cuda", a.ctypes.data, a.shape, a.dtype, a, cuda).rows(1, 3) for a in arrays
    )
    wanted = arrays[0].copy()
    wanted[1, :, 2:6] = arrays[1][1, :, 2:6]
    there.copy_positions(other, 2, 6)
    np.testing.assert_array_equal(arrays[0], wanted)
    np.testing.assert_array_equal(there.positions(5), wanted[1, :, :5])
    there.set_positions(arrays[1][0, :, :3])
    wanted[1, :, :3] = arrays[1][0, :, :3]
    np.testing.assert_array_equal(arrays[0], wanted)


def test_cuda_graphs_are_refused_where_there_is_no_cuda(bundle: Path) -> None:
    with pytest.raises(OptionError, match="wanted device cuda for cuda_graphs; found cpu"):
        Generator(bundle, device="cpu", cuda_graphs=True)


@on_a_card
@pytest.mark.parametrize("graphs", [False, True])
def test_logits_on_a_card_are_those_of_the_processor(half: Path, graphs: bool) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (1, 60))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph that gives something else would warn
        opened = open_bundle(half)
        for decoder in (
            Decoder(opened, device="cpu"),
            Decoder(opened, device="cuda", cuda_graphs=graphs),
        ):
            assert decoder.engine.captures == (graphs and decoder.engine.device == "cuda")
            cache = decoder.new_cache(61)
            parts = [decoder.run(ids[:, :30], cache, keep=0).copy()]
            parts += [decoder.run(ids[:, i : i + 1], cache).copy() for i in range(30, 60)]
            found.append(np.concatenate(parts, axis=1))
    on_cpu, on_card = found
    np.testing.assert_allclose(on_card, on_cpu, atol=0.02 * np.abs(on_cpu).max())


@on_a_card
@pytest.mark.parametrize("graphs", [False, True])
def test_a_batch_on_a_card_gives_what_its_prompts_give_alone(half: Path, graphs: bool) -> None:
    """Rows of several lengths, of which some end early: the others move into their places."""
    prompts = ["The king said", "Once", "In the morning the old man went", "A"]
    configs = [GenerationConfig(max_new_tokens=n) for n in (3, 30, 12, 40)]
    with Generator(half, device="cuda", cuda_graphs=graphs) as generator:
        together = generator.complete_batch(prompts, config=configs)
        for prompt, config, done in zip(prompts, configs, together, strict=True):
            alone = generator.complete(prompt, config=config)
            # Kernels of a batch add up in another order: further on two ids may be as likely.
            assert alone.ids[:3] == done.ids[:3]
            assert 3 <= len(done.ids) <= (config.max_new_tokens or 0)


@on_a_card
def test_sessions_on_a_card_fork_and_outlast_their_process(half: Path, tmp_path: Path) -> None:
    with Generator(half, device="cuda") as generator:
        session = Session(generator)
        session.append("The king said")
        session.generate(max_new_tokens=5)
        other = session.fork()
        session.save(tmp_path / "session")
        again = Session.load(generator, tmp_path / "session")
        wanted = session.complete(max_new_tokens=8).ids
        assert other.complete(max_new_tokens=8).ids == wanted
        assert again.complete(max_new_tokens=8).ids == wanted


@on_a_card
def test_beams_on_a_card_are_those_of_the_processor(half: Path) -> None:
    with Generator(half, device="cuda") as card, Generator(half, device="cpu") as processor:
        options = {"num_beams": 3, "max_new_tokens": 8}
        found, wanted = (g.complete("The king said", **options).ids for g in (card, processor))
        assert found[:3] == wanted[:3]


@on_a_card
@pytest.mark.parametrize("graphs", [False, True])
def test_a_call_on_a_card_can_be_cancelled(half: Path, graphs: bool) -> None:
    with Generator(half, device="cuda", cuda_graphs=graphs) as generator:
        stop, options = Cancellation(), {"max_new_tokens": 40, "min_new_tokens": 40}
        stream = generator.stream("A", **options, cancellation=stop)
        for _ in range(12):  # with graphs the step is captured by then
            next(stream)
        stop.cancel()
        list(stream)
        assert stream.result.finish_reason == "cancelled"
        assert 12 <= len(stream.result.ids) < 40
        assert len(generator.complete("A", **options).ids) == 40


@on_a_card
def test_fidelity_is_measured_on_a_card(half: Path, run: Run, text_file: Path) -> None:
    _, fidelity = verify(half, run.path, text_file, tokens=2048, device="cuda")
    assert fidelity.perplexity_ratio < 1.01
    assert fidelity.kl < 0.02


@on_a_card
def test_only_shapes_are_computed_elsewhere(half: Path) -> None:
    decoder = Decoder(open_bundle(half), device="cuda")
    assert decoder.engine.device == "cuda"
    assert set(decoder.engine.elsewhere) <= {"Shape", "Squeeze", "Cast", "Sub", "Max", "Mod"}
    assert any(f.what == "bundle" and "runs on cuda" in f.found for f in diagnose(half))
