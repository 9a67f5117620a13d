"""Strict JSON: frozen dataclasses with bounds, every fault reported at once.

A dataclass is its own schema: its fields and their types, `bounded` for numbers, and an optional
method `faults()` for what no single field can say. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from gptrt.errors import GptrtError

T = TypeVar("T")


def bounded(low: float, high: float, **kwargs: Any) -> Any:
    """A dataclass field whose value must lie in [low, high]."""
    return dataclasses.field(metadata={"low": low, "high": high}, **kwargs)


def decode(
    kind: type[T],
    value: Any,
    *,
    error: type[GptrtError],
    source: str,
    do: str = "restore the original file",
) -> T:
    """Build `kind` from parsed JSON, refusing unknown keys, wrong types and absurd numbers.

    Every fault is reported at once, each with the key where it stands.

    >>> decode(tuple[int, ...], [1, 2], error=GptrtError, source="list")
    (1, 2)
    """
    faults: list[str] = []
    result = _decode(kind, value, "", faults)
    if faults:
        raise error(f"a valid {source}", found="; ".join(faults), do=do)
    return typing.cast(T, result)


def encode(value: Any) -> Any:
    """The JSON form of what `decode` reads."""
    return dataclasses.asdict(value)


def _decode(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where, faults)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            return _fault(faults, where, " or ".join(map(repr, args)), value)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(_member(args, value), value, where, faults)
    if origin is tuple:
        if not isinstance(value, list):
            return _fault(faults, where, "a list", value)
        return tuple(_decode(args[0], v, f"{where}[{i}]", faults) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            return _fault(faults, where, "an object", value)
        return {k: _decode(args[1], v, f"{where}[{k!r}]", faults) for k, v in value.items()}
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return _fault(faults, where, kind.__name__, value)
    return value


def _member(members: tuple[Any, ...], value: Any) -> Any:
    """Of a union `X | None` the one that is not None; of dataclasses the first that has all the
    keys, or the first."""
    kinds = [kind for kind in members if kind is not type(None)]
    keys = set(value) if isinstance(value, dict) else set()
    for kind in kinds if len(kinds) > 1 else ():
        if keys <= {f.name for f in dataclasses.fields(kind)}:
            return kind
    return kinds[0]


def _decode_dataclass(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(value, dict):
        return _fault(faults, where, "an object", value)
    before = len(faults)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            faults.append(f"{_join(where, key)} is an unknown key")
    arguments = {}
    for name, spec in fields.items():
        path = _join(where, name)
        if name in value:
            arguments[name] = item = _decode(hints[name], value[name], path, faults)
            low, high = spec.metadata.get("low"), spec.metadata.get("high")
            if low is not None and item is not None and not low <= item <= high:
                faults.append(f"{path} is {item}, wanted {low} to {high}")
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            faults.append(f"{path} is missing")
    if len(faults) > before:
        return None
    result = kind(**arguments)
    faults.extend(f"{where}: {fault}" if where else fault for fault in _own_faults(result))
    return result


def _own_faults(value: Any) -> list[str]:
    check = getattr(value, "faults", None)
    return list(check()) if check else []


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _fault(faults: list[str], where: str, wanted: str, value: Any) -> None:
    try:
        shown = repr(value)
    except RecursionError:  # json reads a little deeper than repr writes
        shown = "nested too deeply"
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    faults.append(f"{where or 'the top level'} is {shown}, wanted {wanted}")


def read_json(path: Path, *, error: type[GptrtError], limit: int = 64 << 20) -> Any:
    """Parse a JSON file of at most `limit` bytes; NaN, Infinity and broken UTF-8 are refused."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path} of at most {limit} bytes", found=f"{size}", do="check the file")
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except OSError as e:
        raise error(f"to read {path}", found=e.strerror or str(e), do="check the path") from e
    except (ValueError, RecursionError) as e:
        raise error(f"JSON in {path}", found=str(e), do="restore the original file") from e


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
