"""docs/api.md: the public names, from their docstrings."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import rankgate

MORE = ("decoding.decode", "hub.adapters.adaptable")  # public, but needed less often


class _Plain:
    """An annotation or a default as it is written: strings bare, functions by name (their repr holds an address)."""

    def __init__(self, written: Any) -> None:
        named = inspect.isfunction(written)
        self.text = (
            written if isinstance(written, str) else written.__name__ if named else inspect.formatannotation(written)
        )

    def __repr__(self) -> str:
        return self.text


def reference() -> str:
    names = [name for name in rankgate.__all__ if callable(getattr(rankgate, name))]
    top = [section(name, getattr(rankgate, name)) for name in sorted(names, key=str.lower)]
    rest = []
    for path in MORE:
        module, name = path.rsplit(".", 1)
        rest.append(section(path, getattr(importlib.import_module(f"rankgate.{module}"), name)))
    return "\n".join(
        (
            "# API reference\n\nWritten by `benchmarks/render.py` from docstrings; do not edit. What the methods "
            "compute is in [methods](methods.md).\n\n## `rankgate`\n",
            *top,
            "## In submodules\n",
            *rest,
        )
    )


def section(name: str, what: Any) -> str:
    parts = [f"### `{name}`\n\n```python\n{signature(name.rpartition('.')[2], what)}\n```\n\n{inspect.getdoc(what)}\n"]
    if inspect.isclass(what):
        for key, member in vars(what).items():
            wrapped = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            doc = getattr(wrapped, "__doc__", None) if key[0] != "_" else None  # its own, not an inherited one
            if doc and isinstance(wrapped, property):
                parts.append(f"- `.{key}`: {joined(doc)}")
            elif doc and inspect.isfunction(wrapped):
                parts.append(f"- `.{signature(key, wrapped)}`: {joined(doc)}")
        parts += [""] if len(parts) > 1 else []
    return "\n".join(parts)


def joined(doc: str) -> str:
    return " ".join(doc.split())


def signature(name: str, what: Any) -> str:
    if inspect.isclass(what) and issubclass(what, Exception):
        return name
    found = inspect.signature(what)
    parameters = [
        p.replace(
            annotation=p.annotation if p.annotation is p.empty else _Plain(p.annotation),
            default=_Plain(p.default) if inspect.isfunction(p.default) else p.default,
        )
        for p in found.parameters.values()
        if p.name not in {"self", "cls"}
    ]
    result = found.return_annotation
    if inspect.isclass(what) or result is found.empty:
        return name + str(inspect.Signature(parameters))
    return name + str(inspect.Signature(parameters, return_annotation=_Plain(result)))
