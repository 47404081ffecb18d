"""HTML and SVG elements as text, escaped unless they are markup already."""

import html
from typing import Any, Iterable, Sequence

__all__ = ["Html", "element", "html_table", "join"]

_VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Html(str):
    """Text that is markup already; :func:`element` escapes every other text."""


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return ``<name attribute="...">children</name>``.

    Args:
        name: of an HTML or SVG element.
        children: :class:`Html` is taken as it is, lists and other iterables are gone through,
            None is left out, everything else is shown as its text, escaped.
        attributes: an underscore at the end is dropped (``class_``), others become hyphens. None
            and False are left out, True has no value.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
    if name in _VOID:
        assert not children, f"<{name}> has no content"
        return Html("".join([*parts, ">"]))
    return Html("".join([*parts, ">", join(children), f"</{name}>"]))


def join(children: Iterable[Any]) -> Html:
    """The children of :func:`element` one after the other, without an element around them."""
    return Html("".join(_markup(child) for child in children))


def _markup(child: Any) -> str:
    if isinstance(child, Html):
        return child
    if child is None:
        return ""
    if isinstance(child, Iterable) and not isinstance(child, str):
        return join(child)
    return html.escape(str(child))


def html_table(
    header: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = None, class_: str = ""
) -> Html:
    """A table whose rows begin with a heading.

    Args:
        header: column headings; cells are children of :func:`element`, or whole ``<th>``.
        rows: cells likewise. A row of a single cell spans the table and heads a group of rows.
        caption: above the table.
    """
    body = []
    for row in rows:
        first, *rest = row
        if not rest:
            heading = element("th", first, colspan=len(header), scope="rowgroup")
            body.append(element("tr", heading, class_="group"))
            continue
        cells = [cell if _is_cell(cell) else element("td", cell) for cell in rest]
        body.append(element("tr", element("th", first, scope="row"), cells))
    headings = [c if _is_cell(c) else element("th", c, scope="col") for c in header]
    return element(
        "table",
        element("caption", caption) if caption is not None else None,
        element("thead", element("tr", headings)),
        element("tbody", body),
        class_=class_ or None,
    )


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, Html) and cell.startswith(("<th", "<td"))
