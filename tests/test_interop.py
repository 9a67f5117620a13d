"""A bundle of ours in the runtimes of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptrt.generator import Generator


def test_onnxruntime_genai_opens_the_bundle_and_gives_the_same_greedy_ids(bundle: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="the other runtime is not installed")
    prompt, count = [5, 250, 17, 3], 40
    ours = Generator(bundle, device="cpu")
    ours.tokenizer = ours.tokenizer.endless()
    wanted = list(ours.tokens(prompt, max_new_tokens=count))

    model = genai.Model(str(bundle))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    theirs = genai.Generator(model, parameters)
    theirs.append_tokens(prompt)
    found: list[int] = []
    while not theirs.is_done():
        theirs.generate_next_token()
        found.append(int(theirs.get_next_tokens()[0]))
    assert found == wanted[: len(found)]
    assert len(found) > 10
    assert genai.Tokenizer(model).decode(found) == ours.tokenizer.decode(found)
