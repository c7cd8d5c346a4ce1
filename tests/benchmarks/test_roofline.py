from pathlib import Path

import pytest
from benchmarks.roofline import Rates, Row, table


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert f"<!-- table: roofline -->\n{table()}<!-- end -->\n" in page


def test_parts_overlap_or_add_up():
    row = Row("", Rates(memory=10.0, source=4.0, launch=0.5), 20.0, 4.0, 6, 0.2, "")
    assert row.parts == (1.0, 2.0, 3.0)
    assert (row.overlapped, row.in_turn) == (pytest.approx(1 / 3), pytest.approx(1 / 6))
