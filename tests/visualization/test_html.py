"""Elements as text."""

import pytest

from kd_d2.visualization.html import Html, element, html_table, join


def test_everything_is_escaped_but_markup():
    made = element("p", "a < b & c", element("b", '"x"'), 5, None, [Html("<i></i>"), "<i>"])
    assert made == "<p>a &lt; b &amp; c<b>&quot;x&quot;</b>5<i></i>&lt;i&gt;</p>"
    assert isinstance(made, Html) and isinstance(join(["<"]), Html) and join(["<"]) == "&lt;"


def test_attributes():
    made = element("input", class_="a", data_x='"<', hidden=True, checked=False, id=None, name=0)
    assert made == '<input class="a" data-x="&quot;&lt;" hidden name="0">'
    with pytest.raises(AssertionError):
        element("br", "content")


def test_table():
    cell = element("td", "1", class_="n")
    made = html_table(["", "<x>"], [["a", cell], ["group"], ["b", "2"]], caption="c")
    assert made == (
        '<table><caption>c</caption><thead><tr><th scope="col"></th><th scope="col">&lt;x&gt;</th>'
        '</tr></thead><tbody><tr><th scope="row">a</th><td class="n">1</td></tr>'
        '<tr class="group"><th colspan="2" scope="rowgroup">group</th></tr>'
        '<tr><th scope="row">b</th><td>2</td></tr></tbody></table>'
    )
    # what begins like a cell but is text is no cell
    assert "&lt;td&gt;" in html_table(["a", "b"], [["c", "<td>"]])
