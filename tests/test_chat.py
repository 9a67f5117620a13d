"""Chat templates: carried along with a checkpoint, rendered as transformers does, in a sandbox."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from export.checkpoint import load_checkpoint, save_checkpoint
from export.options import ConvertOptions
from export.pipeline import convert
from export.reopen import load_bundle
from export.runs import Run
from gptrt.chat import ChatTemplate
from gptrt.errors import DependencyError, PromptError
from gptrt.generator import Generator

from .fakes import FakeDecoder, by_heart, byte_tokenizer

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %}{% generation %} {{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson(indent=2) }}\n{% endif %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{{ ns.n }}: {{ m.content }}\n{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": 'Wh\u00e4t <is> "it"?'},
    {"role": "assistant", "content": "A test."},
    {"role": "user", "content": "Thanks"},
]
TOOLS = [{"name": "sum", "about": "adds <numbers> & more"}]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, WITH_TOOLS])
@pytest.mark.parametrize("answer", [True, False])
def test_a_template_is_rendered_as_transformers_does(template: str, answer: bool) -> None:
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="the reference implementation"
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted, _ = utils.render_jinja_template(
        [TALK], tools=TOOLS, chat_template=template, add_generation_prompt=answer, **tokens
    )
    chat = ChatTemplate(template, **tokens)
    assert chat.render(TALK, tools=TOOLS, add_generation_prompt=answer) == wanted[0]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "by name"])
def test_a_template_goes_along_from_the_folder_to_the_bundle_and_back(
    place: str, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_checkpoint(load_checkpoint(run.path), source)
    if place == "chat_template.jinja":
        (source / place).write_text(LLAMA2)
    else:
        path = source / "tokenizer_config.json"
        several = [{"name": "rag", "template": "x"}, {"name": "default", "template": LLAMA2}]
        found: Any = several if place == "by name" else LLAMA2
        config = json.loads(path.read_text()) | {"chat_template": found}
        path.write_text(json.dumps(config | {"eos_token": {"content": "<|endoftext|>"}}))
    checkpoint = load_checkpoint(source)
    assert checkpoint.chat_template == ChatTemplate(LLAMA2, "<|endoftext|>", "<|endoftext|>")
    (tmp_path / "story.txt").write_text("The king said nothing at all. " * 200)
    options = ConvertOptions("none", verify_text=tmp_path / "story.txt")
    convert(source, tmp_path / "bundle", options)
    assert load_bundle(tmp_path / "bundle").chat_template == checkpoint.chat_template
    with Generator(tmp_path / "bundle", device="cpu") as generator:
        ids = generator.chat_prompt(TALK[1:2])
        assert ids[0] == generator.tokenizer.eos_token_ids[0]
        assert generator.tokenizer.decode(ids).endswith("?[/INST]".replace("?", '"? '))
        assert generator.chat(TALK[1:2], max_new_tokens=5) == generator.generate(
            ids, max_new_tokens=5
        )


def fake(template: str | None) -> Generator:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ChatTemplate(template) if template is not None else None
    return Generator.from_parts(FakeDecoder(by_heart(b"Hi: hello"), context=512), tokenizer)


def test_an_answer_is_what_follows_the_conversation() -> None:
    assert fake("{{ messages[0].content }}: ").chat([{"role": "user", "content": "Hi"}]) == "hello"


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, TALK, "a chat template in its tokenizer_config.json"),
        (CHATML, [{"role": "tool", "content": "1"}], "no tools here"),
        (CHATML, [{"content": "Hi"}], "messages like"),
        (CHATML, {"role": "user", "content": "Hi"}, "messages like"),
        (CHATML, "Hi", "messages like"),
        ("{{ 1 / 0 }}", TALK, "division"),
        ("{% for %}", TALK, "Expected"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", TALK, "unsafe"),
        ("{{ messages.append(1) }}", TALK, "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", TALK, "too big"),
    ],
)
def test_what_a_template_or_its_sandbox_refuses_is_an_error(
    template: str | None, messages: Any, words: str
) -> None:
    with pytest.raises(PromptError, match=words):
        fake(template).chat(messages)


def test_without_jinja2_chat_alone_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    generator = fake(CHATML)
    with pytest.raises(DependencyError, match=r"pip install 'gptrt\[chat\]'"):
        generator.chat(TALK)
    assert generator.generate("Hi: ") == "hello"
