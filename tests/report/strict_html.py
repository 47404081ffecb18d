"""A strict reader of pages: what it does not understand is an error."""

from html.parser import HTMLParser
from typing import Dict, List, Optional

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
# attributes by which a page could fetch something
ADDRESSES = {"action", "background", "data", "formaction", "href", "poster", "src", "srcset"}


class Element:
    """A node of the tree; ``text`` is that of all its descendants."""

    def __init__(self, name: str, attributes: Dict[str, Optional[str]]):
        self.name, self.attributes = name, attributes
        self.children: List = []

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, name: str, class_: str = "") -> List["Element"]:
        """Descendants of a name, with a class."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                if child.name == name and (not class_ or class_ in classes):
                    found.append(child)
                found += child.all(name, class_)
        return found

    def by_id(self, id_: str) -> "Element":
        (found,) = [e for e in self.everything() if e.attributes.get("id") == id_]
        return found

    def everything(self) -> List["Element"]:
        below = [c for c in self.children if isinstance(c, Element)]
        return below + [e for c in below for e in c.everything()]


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(page: str) -> Element:
    """The tree of a page, every element of which is closed in the right order."""
    assert page.startswith("<!DOCTYPE html>\n")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], f"not closed: {[e.name for e in reader.open[1:]]}"
    return reader.root


def check(page: str) -> Element:
    """:func:`read`, and the page needs nothing from outside and refers to nothing that is not."""
    root = read(page)
    elements = root.everything()
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    for element in elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"<{element.name} {name}> runs code"
            if name in ADDRESSES:
                assert value.startswith(("#", "data:")), f"<{element.name} {name}={value[:80]!r}>"
                assert not value.startswith("#") or value[1:] in ids, f"{value} leads nowhere"
            if name in ("for", "aria-labelledby", "aria-describedby"):
                assert value in ids
        if element.name == "style":
            assert "url(" not in element.text and "@import" not in element.text
    assert {e.name for e in elements} & {"iframe", "object", "embed", "base", "form"} == set()
    return root


def table_rows(table: Element) -> Dict[str, List[Element]]:
    """Text of the heading of each row -> its cells."""
    rows = {}
    for row in table.all("tbody")[0].all("tr"):
        (heading,) = row.all("th")
        rows.setdefault(heading.text, row.all("td"))
    return rows
