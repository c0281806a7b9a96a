"""Commands that the pages name can be run, and tables of benchmarks find their places in pages."""

from __future__ import annotations

import re

import pytest
from support.paths import EXAMPLES, ROOT

BENCHMARKS = ROOT / "benchmarks"
# A module or a script, and the rest of its line, which a backslash may continue.
COMMAND = re.compile(
    r"(?:-m (benchmarks(?:\.\w+)+)|(examples/(?!support)[\w/]+\.py))((?:\\\n|[^`\n])*)"
)
OPTION = re.compile(r"(?<!\S)\[?(--[a-z-]+)")


def pages():
    yield from (ROOT / "README.md", ROOT / "Makefile", BENCHMARKS / "README.md")
    yield from (ROOT / "docs").rglob("*.md")
    for folder in (BENCHMARKS, EXAMPLES):
        yield from folder.rglob("*.py")


def commands():
    """Paths of scripts, each with the options that some page names for it."""
    options = {}
    for page in pages():
        # The whole docstring of a script names its options, not one line alone.
        text = page.read_text()
        text = text.split('"""')[1].replace("\n       ", "\\\n") if page.suffix == ".py" else text
        for module, script, rest in COMMAND.findall(text):
            path = f"{module.replace('.', '/')}.py" if module else script
            options.setdefault(path, set()).update(OPTION.findall(rest))
    return options


@pytest.mark.parametrize(("script", "options"), sorted(commands().items()))
def test_a_command_has_its_script_and_its_options(script, options):
    texts = [(ROOT / script).read_text(), (BENCHMARKS / "shared" / "data.py").read_text()]
    assert 'if __name__ == "__main__":' in texts[0]
    assert options <= {"--help", *re.findall(r'"(--[a-z-]+)"', "".join(texts))}


def test_every_script_is_named():
    scripts = {
        str(path.relative_to(ROOT))
        for folder in (BENCHMARKS, EXAMPLES)
        for path in folder.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert scripts <= set(commands())


@pytest.fixture
def tables(monkeypatch):
    pytest.importorskip("tabulate", reason="tabulate is not installed")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.shared import tables

    return tables


def test_tables_take_the_places_of_those_of_a_page(tables, tmp_path, capsys):
    page = tmp_path / "page.md"
    old = tables.table(("name", "value"), [("a", "1")])
    page.write_text(f"before\n\n{old}\n\nbetween | them\n\n{old}\n")
    new = [tables.table(("name", "value"), rows) for rows in ([("b", "2")], [])]
    tables.report({"first": new[0], "second": new[1]}, page)
    assert page.read_text() == f"before\n\n{new[0]}\n\nbetween | them\n\n{new[1]}\n"
    assert f"first\n\n{new[0]}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has 2 tables, the runs give 1: nothing is written"):
        tables.report({"first": new[0], "without runs": "-"}, page)


def test_pages_have_their_tables_as_the_benchmarks_write_them(tables):
    names = set(re.findall(r"docs/results/(\w+)\.md\)", (BENCHMARKS / "README.md").read_text()))
    assert len(names) == 25
    for name in names:
        page = (ROOT / "docs" / "results" / f"{name}.md").read_text()
        for text in tables.TABLE.findall(page):
            head, rule, *rows = (
                [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            )
            words = sum(not cell.endswith(":") for cell in rule)
            assert text == tables.table(head, rows, words)
