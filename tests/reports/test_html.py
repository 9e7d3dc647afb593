"""The page: complete, self-contained, safe against what names hold."""

import json
import re
from pathlib import Path

import pytest

from smelt.core.errors import OutputError
from smelt.core.report import Report
from smelt.reports import html
from tests.reports.sample import report

PLOTLY = re.compile(r"<script>/\*\*.*?</script>", re.DOTALL)


@pytest.fixture(scope="module")
def page() -> str:
    return html.page(report(), "LeNet <script>alert(1)</script>")


def test_everything_is_on_it(page: str) -> None:
    for word in ("50.1×", "98.11%", "−0.11 points", "9.18 kB", "sparse(values: codebook)", "0.55", "92.6%", "500×200"):
        assert word in page, word
    for word in ("code.huffman: {}", "2026-11-22", "2: left fc.bias alone", "MACs, peak memory, latency (step 1, 2)"):
        assert word in page, word
    assert page.count('<span class="mark">simulated</span>') == 6 + 1


def test_it_needs_nothing_else(page: str) -> None:
    own = PLOTLY.sub("", page)
    assert len(own) < 30_000 < len(page)
    assert not re.search(r"(src|href)\s*=|@import|url\(", own)


def test_texts_are_escaped(page: str) -> None:
    assert "<script>alert(1)" not in page and "a &lt;tiny&gt; one" in page


def test_figures_cannot_end_the_script() -> None:
    made = report()
    made.rows = [type(row)(**{**row.__dict__, "after": "</script>"}) for row in made.rows]
    figures = re.search(r"const plots = (.*);\n", html.page(made))
    assert figures is not None and "<" not in figures[1]
    assert json.loads(figures[1])[0]["data"][0]["y"][0] == "0 </script>"


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        html.write(report(), path)
    assert path.read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OutputError):
            html.write(report(), path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "mine"
    size = html.write(report(), path, force=True)
    assert size == path.stat().st_size and path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_without_data_or_rows_has_a_page() -> None:
    made = report()
    made.rows = [row for row in made.rows if row.measure in ("file", "parameters", "non-zeros")]
    made.layers, made.notes = [], []
    assert "50.1×" in html.page(made)
    assert "<html" in html.page(Report())
