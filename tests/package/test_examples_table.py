"""The example that takes a table of one's own: files of every kind, and a brief run."""

from __future__ import annotations

import csv

import pytest
import torch
from support.paths import EXAMPLES, run_example


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "support"))
    import csv_tables

    return csv_tables


def rows(num=40):
    return torch.randn(num, 3).mul(1000).round().div(100).tolist()


def write(path, lines, separator=",", encoding="utf-8", comma=False):
    text = "\n".join(separator.join(map(str, line)) for line in lines)
    path.write_bytes((text.replace(".", ",") if comma else text).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("separator", "encoding", "comma"),
    [
        (",", "utf-8", False),
        (";", "cp1252", True),
        ("\t", "utf-8-sig", True),
        ("|", "utf-8", False),
    ],
)
def test_separators_decimal_commas_and_encodings(tables, tmp_path, separator, encoding, comma):
    numbers, names = rows(), ["Größe", "age", "2020"]
    path = write(tmp_path / "t.csv", [names, *numbers], separator, encoding, comma)
    table = tables.read_table(path)
    assert table.names == names
    torch.testing.assert_close(table.rows, torch.tensor(numbers, dtype=torch.float64))
    assert not table.remarks


def test_words_gaps_and_names_that_repeat(tables, tmp_path):
    numbers = rows()
    lines = [["a", "a", "who", ""], *([*row[:2], "Ann", row[2]] for row in numbers)]
    lines[3][0], lines[5][1], lines[7][3] = "NaN", "", "inf"
    lines[9] = lines[9][:2]
    table = tables.read_table(write(tmp_path / "t.csv", lines))
    assert table.names == ["a", "a (2)", "column 3"]
    assert len(table.rows) == len(numbers) - 4
    # The first line has names, and lines count from 1.
    assert table.lines.tolist() == [n for n in range(2, 42) if n not in (4, 6, 8, 10)]
    assert table.remarks == [
        "Left out, because they hold no numbers: who.",
        "Left out, because they have gaps: 4 rows.",
    ]


def test_a_file_without_names(tables, tmp_path):
    table = tables.read_table(write(tmp_path / "t.csv", rows()))
    assert table.names == ["column 0", "column 1", "column 2"]
    assert len(table.rows) == 40


@pytest.mark.parametrize(
    ("lines", "says"),
    [([["a", "b"], *[[1, 2]] * 5], "twenty rows"), ([["a"], *[[1]] * 30], "two columns")],
)
def test_too_little_is_named(tables, tmp_path, lines, says):
    with pytest.raises(SystemExit, match=says):
        tables.read_table(write(tmp_path / "t.csv", lines))


def test_missing_and_empty_files_are_named(tables, tmp_path):
    with pytest.raises(SystemExit, match="There is no file"):
        tables.read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("\n\n")
    with pytest.raises(SystemExit, match="is empty"):
        tables.read_table(tmp_path / "empty.csv")


@pytest.mark.slow
def test_a_brief_run_writes_samples_scores_and_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    x = torch.randn(80, 2)
    lines = torch.cat([x, x.prod(1, keepdim=True), x.sin()], 1).tolist()
    path = write(tmp_path / "t.csv", [["u", "v", "w", "s", "t"], *lines])
    options = ["--latent-dim", "2", "--seconds", "1", "--out", str(tmp_path)]
    done = run_example("table.py", str(path), *options)
    assert "VERDICT" in done.stdout
    assert "Most unusual of 16 held-out rows" in done.stdout
    with (tmp_path / "samples.csv").open() as file:
        head, *samples = csv.reader(file)
    assert head == ["u", "v", "w", "s", "t", "log density"]
    assert len(samples) == 1000
    with (tmp_path / "scores.csv").open() as file:
        head, *scores = csv.reader(file)
    assert head[:3] == ["line", "held out", "log_prob"]
    assert [int(row[0]) for row in scores] == [*range(2, 82)]
    assert sum(int(row[1]) for row in scores) == 16
    for name in ("table.png", "scores.png"):
        assert (tmp_path / name).stat().st_size > 10_000
