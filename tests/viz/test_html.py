"""Pages of plain HTML: escaped text, shaded cells, colored gains."""

import re

import pytest

from deit.viz import html as page_html

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_nothing_in_a_page_is_taken_for_html():
    nasty = '<script>alert("1")</script>'
    drawn = [
        page_html.paragraph(nasty),
        page_html.key_values({nasty: nasty}),
        page_html.stat_tiles({nasty: nasty}),
        page_html.table([nasty], [[nasty]], caption=nasty),
        page_html.heat_table([nasty], [nasty], [[1.0]], caption=nasty, corner=nasty),
        page_html.figure("", nasty),
        page_html.section(nasty, [], anchor=nasty),
        page_html.details(nasty, [], opened=True),
        page_html.links({nasty: nasty}),
    ]
    whole = page_html.page(nasty, nasty, drawn, foot=nasty)
    assert whole.count("<script>") == 1  # our own


def test_cells_are_the_deeper_the_larger_and_signed_ones_have_two_colours():
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


def test_gains_and_losses_are_coloured():
    table = page_html.table(
        ["", "gain"], [["+1", "+1.0"], ["b", "-0.5"], ["c", "+0.0"], ["d", "-"]]
    )
    assert '<td>+1</td><td class="gain">+1.0</td>' in table
    assert '<td class="loss">-0.5</td>' in table
    assert "<td>+0.0</td>" in table
