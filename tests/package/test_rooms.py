"""The rooms of the house: imports point down, and none leads back to where it came from."""

import re

from support.rooms import HOUSE, PAGE, TOWER, imports, page, room_of


def test_imports_point_down():
    rank = {room: floor for floor, room in enumerate(TOWER)}
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if rank[room_of(other)] > rank[room_of(name)]
    ]
    assert not upward


def test_no_import_leads_back():
    left = imports()
    # Modules that import nothing which is left are taken away; a circle stays.
    while leaves := [name for name, others in left.items() if not others - {name}]:
        for leaf in leaves:
            del left[leaf]
        left = {name: others - set(leaves) for name, others in left.items()}
    assert not left


def test_the_drawing_is_that_of_the_imports():
    assert page() == PAGE.read_text(), "run python tests/support/rooms.py"


def test_no_file_is_long():
    # A module holds one idea; a file of tests one topic.
    for folder, most in ((HOUSE, 350), (PAGE.parents[1] / "tests", 600)):
        lengths = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
        longest = max(lengths, key=lambda path: lengths[path])
        assert lengths[longest] <= most, f"{longest} has {lengths[longest]} lines"


def test_every_module_for_pyro_needs_it():
    """Or torch.distributions, which are Pyro's own; other modules belong into rooms below."""
    for path in (HOUSE / "pyro").rglob("*.py"):
        needs = re.search(r"^(from|import) (pyro|torch\.distributions)\b", path.read_text(), re.M)
        assert needs or path.name == "__init__.py", path
