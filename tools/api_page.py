# SPDX-License-Identifier: Apache-2.0
"""docs/api.md: what lrkern's rooms make public, each with its signature and the first paragraph of its docstring.

python tools/api_page.py     writes the page; tests/tools/test_api_page.py asks that it is current
"""

import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
# Every room but the truth that tests ask.
ROOMS = sorted(
    {path.parent.name for path in (ROOT / "python" / "lrkern").glob("*/__init__.py")} - {"reference"} | {"convert"}
)
TOP = """# API

Made of docstrings by `python tools/api_page.py`. `help(lrkern.peft.patch)` and the like say the rest: arguments, shapes, dtypes,
errors.
"""


def first_paragraph(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def signature(name: str, thing: Any) -> str:
    """With defaults, without types."""
    shown = []
    given = inspect.signature(thing).parameters.values()
    for p in given:
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and "*" not in shown and not any(q.kind is q.VAR_POSITIONAL for q in given):
            shown.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        shown.append(f"{stars}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return f"{name}({', '.join(shown)})"


def own_docstring(thing: Any) -> bool:
    doc = getattr(thing, "__doc__", None)
    return bool(doc) and not (inspect.isclass(thing) and re.match(rf"{thing.__name__}\(", doc))  # a NamedTuple's own


def entry(name: str, thing: Any) -> list[str]:
    if isinstance(thing, types.GenericAlias):
        return [f"- `{name}`: {thing}"]
    text = first_paragraph(thing) if callable(thing) and own_docstring(thing) else ""
    error = inspect.isclass(thing) and issubclass(thing, Exception)
    called = f"{name}: {thing.__base__.__name__}" if error else signature(name, thing) if callable(thing) else name
    lines = [f"- `{called}`" + (f": {text}" if text else "")]
    for method, found in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
        function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
        if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
            lines.append(f"  - `.{signature(method, function)}`: {first_paragraph(function)}")
    return lines


def public(module: Any) -> list[str]:
    functions = (name for name, thing in vars(module).items() if inspect.isfunction(thing) and not name.startswith("_"))
    return sorted(getattr(module, "__all__", None) or functions)


def page() -> str:
    parts = [TOP]
    for room in ROOMS:
        module = importlib.import_module(f"lrkern.{room}")
        lines = [line for name in public(module) for line in entry(name, getattr(module, name))]
        parts.append(f"## lrkern.{room}\n\n{first_paragraph(module)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
