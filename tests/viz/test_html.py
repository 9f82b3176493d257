"""HTML pages: escaped text, shaded cells, colored gains."""

import re

import pytest

from deit.viz import html as page_html

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_page_with_html_in_its_texts_escapes_them():
    script = '<script>alert("1")</script>'
    body = [
        page_html.paragraph(script),
        page_html.key_values({script: script}),
        page_html.stat_tiles({script: script}),
        page_html.table([script], [[script]], caption=script),
        page_html.heat_table([script], [script], [[1.0]], caption=script, corner=script),
        page_html.figure("", script),
        page_html.section(script, [], anchor=script),
        page_html.details(script, [], opened=True),
        page_html.links({script: script}),
    ]
    page = page_html.page(script, script, body, foot=script)
    assert page.count("<script>") == 1  # that of page.js


def test_heat_table_shades_cells_by_value_and_sign():
    table = page_html.heat_table(["a"], ["x", "y", "z"], [[1.0, None, 3.0]])
    assert re.findall(r"--v:([\d.]+)", table) == ["0.000", "1.000"]
    assert "<td></td>" in table
    signed = page_html.heat_table(
        ["a"], ["x", "y"], [[-4.0, 2.0]], signed=True, cell_format="{:+.0f}"
    )
    assert re.findall(r'--v:([\d.]+)(;--tone)?[^"]*">([^<]+)', signed) == [
        ("1.000", ";--tone", "-4"),
        ("0.500", "", "+2"),
    ]


def test_table_colors_gains_and_losses():
    table = page_html.table(
        ["", "gain"], [["+1", "+1.0"], ["b", "-0.5"], ["c", "+0.0"], ["d", "-"]]
    )
    assert '<td>+1</td><td class="gain">+1.0</td>' in table
    assert '<td class="loss">-0.5</td>' in table
    assert "<td>+0.0</td>" in table
