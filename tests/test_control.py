"""Ending calls from outside, many threads, asyncio, and what memory is allowed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptrt.config import GenerationConfig
from gptrt.errors import CancelledError, GptrtError, MemoryLimitError, OptionError
from gptrt.generator import Generator
from gptrt.interrupt import Cancellation
from gptrt.sampling import Logits
from gptrt.session import Session
from gptrt.testing import FakeDecoder, FakeGenerator, byte_tokenizer
from tests.fakes import EOS, favouring, noise

HUNG = 20.0  # seconds: nothing here takes one


class Slow:
    """A model that takes its time, and tells when it has begun."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.begun, self._seconds = threading.Event(), seconds

    def __call__(self, seen: list[int]) -> Logits:
        self.begun.set()
        time.sleep(self._seconds)
        return favouring(97 + len(seen) % 26)


def slow_generator(model: Slow) -> Generator:
    return Generator.from_parts(FakeDecoder(model, context=4096), byte_tokenizer())


# --- ending -------------------------------------------------------------------------------------


def test_a_cancelled_call_gives_what_it_has() -> None:
    model, stop = Slow(), Cancellation()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            slow_generator(model).complete, "x", max_new_tokens=4000, cancellation=stop
        )
        assert model.begun.wait(HUNG)
        time.sleep(0.1)
        stop.cancel()
        result = future.result(HUNG)
    assert result.finish_reason == "cancelled"
    assert 0 < len(result.ids) < 4000
    assert result.text == "".join(map(chr, result.ids))


def test_a_cancellation_that_came_first_ends_a_call_at_once() -> None:
    stop = Cancellation()
    stop.cancel()
    generator = slow_generator(Slow())
    assert generator.complete("x", cancellation=stop).finish_reason == "cancelled"
    assert generator.complete("x", max_new_tokens=2).finish_reason == "length"


def test_a_generator_cancels_all_that_is_under_way_and_nothing_later() -> None:
    model = Slow()
    generator = slow_generator(model)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(generator.complete, f"{n}", max_new_tokens=4000) for n in range(3)]
        time.sleep(0.2)
        generator.cancel()
        results = [future.result(HUNG) for future in futures]
    assert {result.finish_reason for result in results} == {"cancelled"}
    assert generator.complete("y", max_new_tokens=2).finish_reason == "length"


def test_a_call_without_parts_says_that_it_was_cancelled() -> None:
    """It could give nothing else; and the generator goes on."""
    calls: list[Callable[[Generator], Any]] = [
        lambda generator: generator.classify("ab", ["a", "b"]),
        lambda generator: generator.score("ab", [" b", " c"]),
        lambda generator: generator.perplexity("abc", stride=1),
    ]
    for call in calls:
        model = Slow(0.1)
        generator = slow_generator(model)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(call, generator)
            assert model.begun.wait(HUNG)
            generator.cancel()
            assert isinstance(future.exception(HUNG), CancelledError)
        assert call(generator)


def test_a_timeout_of_any_length_is_one() -> None:
    for timeout in (1e10, float("inf")):
        result = slow_generator(Slow(0.0)).complete("x", max_new_tokens=2, timeout=timeout)
        assert result.finish_reason == "length"


@pytest.mark.parametrize("control", [{"cancellation": "x"}, {"progress": 5}])
def test_what_cannot_control_a_call_is_refused(control: dict[str, Any]) -> None:
    generator = slow_generator(Slow(0.0))
    with pytest.raises(OptionError, match=next(iter(control))):
        generator.generate("x", **control)
    session = Session(generator)
    with pytest.raises(OptionError, match=next(iter(control))):
        session.append("x", **control)
    assert session.ids == ()


def test_a_timeout_ends_a_batch_and_leaves_what_is_done() -> None:
    generator = slow_generator(Slow(0.01))
    short, long = generator.complete_batch(
        ["a", "b"],
        config=[
            GenerationConfig(max_new_tokens=2, timeout=0.5),
            GenerationConfig(max_new_tokens=4000, timeout=0.5),
        ],
    )
    assert (short.finish_reason, long.finish_reason) == ("length", "time")
    assert len(long.ids) > 2


def test_a_real_pass_is_interrupted_and_the_generator_stays_usable(bundle: Path) -> None:
    generator = Generator(bundle, device="cpu", threads=1)
    wanted = generator.complete("The king", max_new_tokens=5).ids
    for _ in range(20):
        result = generator.complete("The king", max_new_tokens=40, timeout=1e-4)
        assert result.finish_reason in ("time", "length", "stop")
        assert generator.complete("The king", max_new_tokens=5).ids == wanted


def test_a_stream_that_is_left_says_so() -> None:
    stream = slow_generator(Slow(0.0)).stream("x", max_new_tokens=100)
    with stream:
        assert next(stream) == "b"
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == "b"
    assert list(stream) == []


def test_progress_is_told_of_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptrt.reading.LONGEST_PASS", 4)
    told: list[tuple[int, int]] = []
    generator = slow_generator(Slow(0.0))
    generator.generate(
        "0123456789", max_new_tokens=1, progress=lambda done, of: told.append((done, of))
    )
    assert told == [(4, 10), (8, 10), (10, 10)]


# --- threads ------------------------------------------------------------------------------------


def test_many_threads_get_what_each_gets_alone(bundle: Path) -> None:
    generator = Generator(bundle, device="cpu", threads=1)
    fresh = Generator.from_parts(generator.decoder, generator.tokenizer, reuse="none")
    asked = [([n, 2 * n + 1, 299 - n], {"seed": n, "temperature": 0.9}) for n in range(12)]
    wanted = [fresh.complete(ids, max_new_tokens=20, **chance) for ids, chance in asked]

    def work(number: int) -> Any:
        ids, chance = asked[number % 12]
        if number % 3:
            return generator.complete(ids, max_new_tokens=20, **chance)
        return generator.complete_batch([ids, [1, 2]], max_new_tokens=20, **chance)[0]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, range(60)))
    for number, result in enumerate(found):
        assert result == wanted[number % 12]


def test_a_session_is_for_one_thread_at_a_time() -> None:
    session = Session(slow_generator(Slow(0.0)))
    session.append("x")
    stream = session.stream(max_new_tokens=5)
    next(stream)
    with pytest.raises(GptrtError, match="nothing else uses"):
        session.append("y")
    stream.close()
    session.append("y")


# --- asyncio ------------------------------------------------------------------------------------


def test_streams_and_results_can_be_awaited() -> None:
    async def main() -> tuple[list[str], str]:
        generator = slow_generator(Slow(0.0))
        pieces = [piece async for piece in generator.stream_async("x", max_new_tokens=3)]
        return pieces, (await generator.complete_async("x", max_new_tokens=3)).text

    pieces, text = asyncio.run(main())
    assert "".join(pieces) == text == "bcd"


def test_a_cancelled_task_ends_its_call() -> None:
    model = Slow()
    generator = slow_generator(model)

    async def main() -> None:
        task = asyncio.ensure_future(generator.complete_async("x", max_new_tokens=4000))
        await asyncio.to_thread(model.begun.wait, HUNG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), HUNG))
    assert not generator.calls.listed


def test_a_task_that_waits_for_a_thread_is_cancelled_at_once() -> None:
    model = Slow()
    generator = slow_generator(model)

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        stop = Cancellation()
        busy = asyncio.ensure_future(
            generator.complete_async("x", max_new_tokens=4000, cancellation=stop)
        )
        while not model.begun.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(generator.complete_async("y", max_new_tokens=4000))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not busy.done()
        stop.cancel()
        assert (await busy).finish_reason == "cancelled"

    asyncio.run(asyncio.wait_for(main(), HUNG))


def test_cancel_ends_all_searches_of_a_batch() -> None:
    model = Slow()
    generator = slow_generator(model)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            generator.complete_batch, ["x", "y", "z"], num_beams=2, max_new_tokens=2000
        )
        assert model.begun.wait(HUNG)
        generator.cancel()
        found = future.result(HUNG)
    assert [result.finish_reason for result in found] == ["cancelled"] * 3


def test_a_cancellation_of_the_callers_ends_what_a_task_waits_for() -> None:
    async def main() -> list[str]:
        stop = Cancellation()
        pieces = []
        async for piece in FakeGenerator(lambda _: "y" * 500).stream_async("x", cancellation=stop):
            pieces.append(piece)
            stop.cancel()
        done = await FakeGenerator({"x": "yz"}).complete_async("x", cancellation=stop)
        return [*pieces, done.finish_reason]

    assert asyncio.run(asyncio.wait_for(main(), HUNG)) == ["y", "cancelled"]


def test_leaving_an_asynchronous_stream_ends_its_call() -> None:
    generator = slow_generator(Slow())

    async def main() -> None:
        pieces = generator.stream_async("x", max_new_tokens=4000)
        assert await anext(pieces) == "b"
        await pieces.aclose()

    asyncio.run(asyncio.wait_for(main(), HUNG))
    assert not generator.calls.listed


# --- memory -------------------------------------------------------------------------------------


def test_a_call_that_needs_too_much_memory_is_refused_and_a_smaller_one_is_not() -> None:
    decoder = FakeDecoder(noise, context=4096)
    limit = decoder.cache_bytes(256)
    generator = Generator.from_parts(decoder, byte_tokenizer(), cache_limit=limit)
    with pytest.raises(MemoryLimitError, match="ask for fewer new tokens"):
        generator.generate("x", max_new_tokens=2000)
    assert len(generator.complete("x", max_new_tokens=20).ids) == 20
    with pytest.raises(MemoryLimitError):
        generator.complete_batch(["x"] * 8, max_new_tokens=100)


def test_what_is_kept_for_later_makes_room() -> None:
    decoder = FakeDecoder(noise, context=4096)
    limit = decoder.cache_bytes(128)
    generator = Generator.from_parts(decoder, byte_tokenizer(), cache_limit=limit)
    for prompt in ("one", "two", "three"):
        generator.generate(prompt, max_new_tokens=20)
        generator.generate(prompt, max_new_tokens=100)


def test_a_stream_that_is_collected_in_the_middle_of_another_call_blocks_nobody() -> None:
    """Python may end a stream that was left wherever it likes: here, while a cache is lent."""
    decoder, left = FakeDecoder(noise, context=256), []
    generator = Generator.from_parts(decoder, byte_tokenizer())
    made = decoder.new_cache

    def new_cache(*args: Any) -> Any:
        while left:
            left.pop().close()
        return made(*args)

    decoder.new_cache = new_cache  # type: ignore[method-assign]
    for n in range(3):
        stream = generator.stream("once", max_new_tokens=9)
        next(stream)
        left.append(stream)
        del stream
        done = threading.Thread(target=generator.generate, args=(f"{n}",), daemon=True)
        done.start()
        done.join(60)
        assert not done.is_alive()
        assert not left and generator.calls.shelf.lent == 0


def test_cancelling_reaches_streams_that_outlive_the_generator() -> None:
    generator = Generator.from_parts(FakeDecoder(noise, context=256), byte_tokenizer())
    stream = generator.stream("once", max_new_tokens=9, min_new_tokens=9)
    next(stream)
    generator.close()
    generator.cancel()
    for _ in stream:
        pass
    assert stream.result.finish_reason == "cancelled"


def test_caches_are_as_large_as_the_request(bundle: Path) -> None:
    generator = Generator(bundle, device="cpu", threads=1, reuse="none")
    stream = generator.stream("The king", max_new_tokens=5)
    next(stream)
    lent = generator.calls.shelf.lent
    assert lent == generator.decoder.cache_bytes(64)
    stream.close()
    assert generator.calls.shelf.lent == 0


def test_a_limit_leaves_room_for_weights_and_libraries(bundle: Path) -> None:
    needs = Generator.estimate(bundle)
    assert needs.cache == Generator(bundle, threads=1).decoder.cache_bytes(64)
    with pytest.raises(MemoryLimitError, match="use a smaller bundle"):
        Generator(bundle, memory_limit=needs.weights)
    tight = Generator(bundle, threads=1, memory_limit=needs.total)
    assert tight.generate("The king", max_new_tokens=4)
    with pytest.raises(MemoryLimitError, match="raise memory_limit"):
        tight.complete_batch(["The king"] * 2, max_new_tokens=40)


def test_an_estimate_grows_with_length_and_rows(bundle: Path) -> None:
    one, two = (Generator.estimate(bundle, max_length=32, batch=n) for n in (1, 2))
    assert two.cache == 2 * one.cache == Generator.estimate(bundle).cache
    for length, batch in ((0, 1), (65, 1), (8, 0)):
        with pytest.raises(OptionError, match="max_length from 1 to 64"):
            Generator.estimate(bundle, max_length=length, batch=batch)


@pytest.mark.parametrize("reuse", ["some", None, True])
def test_an_unknown_way_to_reuse_is_refused(reuse: Any) -> None:
    with pytest.raises(OptionError, match='"exact", "all" or "none"'):
        Generator.from_parts(FakeDecoder(noise), byte_tokenizer(), reuse=reuse)


def test_what_was_read_is_not_read_again() -> None:
    decoder = FakeDecoder(noise, context=256)
    generator = Generator.from_parts(decoder, byte_tokenizer())
    first = generator.complete("0123456789", max_new_tokens=4)
    decoder.passes.clear()
    again = generator.complete("0123456789abcd", max_new_tokens=1)
    assert (again.timings.reused_tokens, decoder.passes) == (10, [4])  # type: ignore[union-attr]
    everything = [*first.prompt_ids, *first.ids, 1, 2, 3, 4]
    decoder.passes.clear()
    generator.complete(everything, max_new_tokens=1)
    assert decoder.passes == [8]  # what was generated is read as a prompt would be
    fast = Generator.from_parts(decoder, byte_tokenizer(), reuse="all")
    first = fast.complete("0123456789", max_new_tokens=4)
    decoder.passes.clear()
    fast.complete([*first.prompt_ids, *first.ids, 1, 2], max_new_tokens=1)
    assert decoder.passes == [3]  # all but the last generated id was read


def test_prompts_of_a_batch_that_begin_alike_are_read_once() -> None:
    decoder = FakeDecoder(noise, context=256)
    generator = Generator.from_parts(decoder, byte_tokenizer())
    results = generator.complete_batch(
        [f"a long beginning {n}" for n in range(4)], max_new_tokens=1
    )
    assert decoder.passes == [18, 2, 2, 2]
    assert [r.timings and r.timings.reused_tokens for r in results] == [0, 16, 16, 16]


def test_timings_and_log_probabilities_come_with_the_result() -> None:
    generator = Generator.from_parts(FakeDecoder(noise), byte_tokenizer())
    result = generator.complete("x", max_new_tokens=9, top_logprobs=3)
    assert result.timings is not None and result.timings.first_token is not None
    assert 0 < result.timings.first_token <= result.timings.total
    assert result.timings.tokens_per_second is not None
    assert result.logprobs is not None and result.top_logprobs is not None
    for chosen, likeliest in zip(result.logprobs, result.top_logprobs, strict=True):
        assert chosen == likeliest[0][1]  # greedy takes the likeliest
        assert [value for _, value in likeliest] == sorted((v for _, v in likeliest), reverse=True)
    logits = noise([120])
    wanted = logits[result.ids[0]] - np.log(np.exp(logits).sum())
    assert result.logprobs[0] == pytest.approx(wanted, abs=1e-5)


def test_a_text_that_ends_by_itself_took_no_longer_than_to_its_end() -> None:
    """Not until its result was asked for, nor until the last of its batch had ended."""
    decoder = FakeDecoder(lambda seen: favouring(EOS if seen[0] == 97 else 98), context=256)
    generator = Generator.from_parts(decoder, byte_tokenizer())
    stream = generator.stream("a")
    assert list(stream) == []
    assert stream.result.timings == stream.result.timings
    short, long = generator.complete_batch(["a", "b"], max_new_tokens=200)
    assert short.timings is not None and long.timings is not None
    assert (short.finish_reason, long.finish_reason) == ("stop", "length")
    assert short.timings.total < long.timings.total
