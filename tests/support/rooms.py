"""The rooms of the package, read from its imports, and their drawing in docs/contributing.md.

``python tests/support/rooms.py`` draws them anew.
"""

from __future__ import annotations

import ast
from pathlib import Path

import normflows_injective

HOUSE = Path(normflows_injective.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "contributing.md"
START, END = "<!-- rooms: drawn by tests/support/rooms.py -->\n", "<!-- end of rooms -->\n"
# From the ground up.
TOWER = (
    "_version",
    "errors",
    "checks",
    "checkpoints",
    "modules",
    "host",
    "autodiff",
    "nets",
    "volume",
    "flows",
    "points",
    "distributions",
    "models",
    "training",
    "layerwise",
    "diagnostics",
    "testing",
    "pyro",
    "registration",
    "__init__",
)
# Every room may import these, so that arrows to them say nothing.
GROUND = ("_version", "errors", "checks", "__init__")


def imports() -> dict[str, set[str]]:
    """The modules that each module imports, anywhere in its text."""
    texts = {
        ".".join(path.relative_to(HOUSE).with_suffix("").parts): path.read_text()
        for path in HOUSE.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): name for name in texts}
    imported: dict[str, set[str]] = {name: set() for name in texts}
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = name.split(".")[: -node.level] + [part for part in [node.module] if part]
                for alias in node.names:
                    inner, outer = ".".join([*base, alias.name]), ".".join(base)
                    imported[name].add(names.get(inner) or names.get(outer) or "__init__")
            else:
                absolute = getattr(node, "module", None) or ""
                aliases = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not any(n.startswith(HOUSE.name) for n in [absolute, *aliases]), name
    return imported


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return module.partition(".")[0]


def arrows() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    pairs = {(room_of(m), room_of(other)) for m, others in imports().items() for other in others}
    return {(room, other) for room, other in pairs if room != other}


def drawing() -> str:
    """The rooms as a diagram, without arrows that follow from others."""
    below: dict[str, set[str]] = {room: set() for room in TOWER}
    for room, other in arrows():
        below[room].add(other)
    lines = ["```mermaid", "flowchart TD"]
    for room in reversed(TOWER):
        if room in GROUND:
            continue
        direct = below[room] - set(GROUND)
        through = {last for other in direct for last in _reached(below, other) if last != other}
        lines += [f"    {room} --> {other}" for other in sorted(direct - through)]
    return "\n".join([*lines, "```", ""])


def _reached(below: dict[str, set[str]], room: str) -> set[str]:
    return {room}.union(*(_reached(below, other) for other in below[room]))


def page() -> str:
    """The page with the drawing as the imports have it now."""
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    return before + START + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page())
