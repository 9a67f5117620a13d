"""A bundle of ours in the runtimes of others: one folder, the same greedy ids."""

from __future__ import annotations

import pytest

from gptrt.generator import Generator
from gptrt.opening import embedded_bundle

PROMPT, COUNT = [5, 250, 17, 3], 100


@pytest.fixture(scope="module")
def ours() -> list[int]:
    with Generator(device="cpu") as generator:
        endless = Generator.from_parts(generator.decoder, generator.tokenizer.endless())
        return list(endless.tokens(PROMPT, max_new_tokens=COUNT))


def test_onnxruntime_genai_gives_the_same_greedy_ids_and_text(ours: list[int]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="the other runtime is not installed")
    model = genai.Model(str(embedded_bundle()))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + COUNT, do_sample=False)
    theirs = genai.Generator(model, parameters)
    theirs.append_tokens(PROMPT)
    found: list[int] = []
    while not theirs.is_done():
        theirs.generate_next_token()
        found.append(int(theirs.get_next_tokens()[0]))
    assert found == ours
    with Generator(device="cpu") as generator:
        assert genai.Tokenizer(model).decode(found) == generator.tokenizer.decode(found)


def test_optimum_gives_the_same_greedy_ids(ours: list[int]) -> None:
    optimum = pytest.importorskip(
        "optimum.onnxruntime", reason="the other runtime is not installed"
    )
    import torch

    model = optimum.ORTModelForCausalLM.from_pretrained(embedded_bundle(), use_io_binding=False)
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    found = model.generate(torch.tensor([PROMPT]), eos_token_id=None, **options)[0]
    assert found.tolist() == [*PROMPT, *ours]
