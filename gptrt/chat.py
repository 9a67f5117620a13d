"""Conversations as a model was taught to read them: the chat template of its tokenizer, rendered in
jinja2's sandbox, where a template reaches nothing but what it is given."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gptrt.errors import BundleError, DependencyError, PromptError
from gptrt.format import TOKENIZER_CONFIG_FILE
from gptrt.schema import read_json

TEMPLATE_FILE = "chat_template.jinja"  # where newer folders keep it

Message = Mapping[str, Any]  # role and content, and what else a template may know


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source, and the tokens that begin and end a text, which templates like to write."""

    source: str
    bos_token: str = ""
    eos_token: str = ""

    @classmethod
    def read(cls, folder: Path, listed: Container[str] | None = None) -> ChatTemplate | None:
        """That of a folder, if it has one; of its files only those that are `listed`, if they are.
        Raises BundleError for JSON that is none."""
        path, file = (
            _if_listed(folder / name, listed) for name in (TOKENIZER_CONFIG_FILE, TEMPLATE_FILE)
        )
        config = {} if path is None else read_json(path, error=BundleError)
        if not isinstance(config, dict):
            return None
        source = _source(config) if file is None else _read_text(file)
        tokens = (_text(config.get(f"{name}_token")) for name in ("bos", "eos"))
        return cls(source, *tokens) if source else None

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation, up to where an answer would begin. `variables` are what else
        the template asks for: `tools`, or `add_generation_prompt=False` to leave the answer out.

        Raises PromptError for messages that the template refuses, DependencyError without jinja2.
        """
        try:
            from jinja2 import TemplateError
        except ImportError as e:
            raise DependencyError(
                "jinja2, for chat templates", found=str(e), do="pip install 'gptrt[chat]'"
            ) from e
        given = {"bos_token": self.bos_token, "eos_token": self.eos_token, **variables}
        given = {"add_generation_prompt": True, **given}
        try:
            template = _environment().from_string(self.source)
            return str(template.render(messages=_checked(messages), **given))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as e:
            raise PromptError(
                "messages that the chat template takes", found=str(e), do="correct them"
            ) from e


def _if_listed(path: Path, listed: Container[str] | None) -> Path | None:
    """What nobody has hashed is no part of a bundle."""
    return path if path.is_file() and (listed is None or path.name in listed) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"a chat template in {path}", found=str(e), do="restore the file") from e


def _source(config: Mapping[str, Any]) -> str:
    """One template, or several by name."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return found if isinstance(found, str) else ""


def _text(token: Any) -> str:
    """A token is a text, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    rows = [dict(m) if isinstance(m, Mapping) else {} for m in messages]
    if isinstance(messages, (str, Mapping)) or not all(
        isinstance(m.get("role"), str) for m in rows
    ):
        raise PromptError(
            'messages like {"role": "user", "content": "..."}',
            found=repr(messages)[:60],
            do="give a list of them",
        )
    return rows


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks answers for training, says nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    # Plain JSON: jinja2's own filter escapes for HTML.
    environment.filters["tojson"] = lambda value, **how: json.dumps(
        value, **{"ensure_ascii": False, **how}
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
