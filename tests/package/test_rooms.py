"""The rooms of the house: imports point down, and none leads back to where it came from."""

import ast
from pathlib import Path

import normflows_injective

HOUSE = Path(normflows_injective.__file__).parent
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
    "distributions",
    "models",
    "layerwise",
    "diagnostics",
    "pyro",
    "registration",
    "testing",
    "__init__",
)


def _imports() -> dict[str, set[str]]:
    """The modules that each module imports, anywhere in its text."""
    texts = {
        ".".join(path.relative_to(HOUSE).with_suffix("").parts): path.read_text()
        for path in HOUSE.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): name for name in texts}
    found: dict[str, set[str]] = {name: set() for name in texts}
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = name.split(".")[: -node.level] + [part for part in [node.module] if part]
                for alias in node.names:
                    inner, outer = ".".join([*base, alias.name]), ".".join(base)
                    found[name].add(names.get(inner) or names.get(outer) or "__init__")
            else:
                absolute = getattr(node, "module", None) or ""
                aliases = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not any(n.startswith(HOUSE.name) for n in [absolute, *aliases]), name
    return found


def _room(name: str) -> int:
    return TOWER.index(name.partition(".")[0])


def test_imports_point_down():
    upward = [
        f"{name} imports {other}"
        for name, others in _imports().items()
        for other in others
        if _room(other) > _room(name)
    ]
    assert not upward


def test_no_import_leads_back():
    imports = _imports()
    # What imports nothing that is left, is taken away; a circle stays.
    while leaves := [name for name, others in imports.items() if not others - {name}]:
        for leaf in leaves:
            del imports[leaf]
        imports = {name: others - set(leaves) for name, others in imports.items()}
    assert not imports
