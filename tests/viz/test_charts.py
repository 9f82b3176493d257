"""Charts as SVG for a page and as PNG files."""

import re
from pathlib import Path

import pytest

from deit.viz import charts
from deit.viz import html as page_html

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_chart_with_html_in_its_name_escapes_it(tmp_path):
    svg = charts.chart(CHARTS["curves"], tmp_path / 'x"><img src=q onerror=alert(1)>.png')
    assert "<img" not in svg
    assert 'id="x---img' in svg


CHARTS = {
    "curves": charts.curves({"class": [(1, 0.5), (2, 0.6)]}, {"teacher": 0.9}),
    "over_epochs": charts.over_epochs({"loss": [(1, 2.0), (2, 1.0)], "b": [(1, 1.0)]}, "loss"),
    "per_class": charts.per_class(["$a$", "b" * 60], {"student": [0.5, 1], "teacher": [1, 1]}),
    "reliability": charts.reliability({"student": [(0.5, 0.4, 10), (0.9, 0.9, 5)]}),
    "token_cosine_chart": charts.token_cosine_chart([0.1, 0.5, 0.9]),
    "scatter": charts.scatter({"$x": (1.0, 50.0), "y": (100.0, 60.0)}, "s", "%"),
}


@pytest.mark.parametrize("name", CHARTS)
def test_chart_uses_css_variables_and_writes_a_png(name, tmp_path):
    svg = charts.chart(CHARTS[name], tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert svg.startswith("<svg")
    assert "<metadata>" not in svg
    assert "var(--c1)" in svg
    assert "var(--faint)" in svg
    assert not any(hex_code in svg for hex_code in (charts.INK, charts.FAINT, *charts.SERIES))
    assert charts.chart(CHARTS[name], tmp_path / f"{name}.png") == svg
    style = (Path(page_html.__file__).with_name("page.css")).read_text()
    for variable in set(re.findall(r"var\(--([\w-]+)\)", svg)):
        assert f"--{variable}:" in style
