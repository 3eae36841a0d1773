"""HTML as a test reads it: tags that close, tables by their captions, texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "hr", "input", "col", "wbr"}


@dataclass
class Element:
    """A tag with what is in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.children)

    def all(self, *tags: str) -> list[Element]:
        """Elements of these tags (all for none) below this one, in their order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if not tags or child.tag in tags:
                    found.append(child)
                found += child.all(*tags)
        return found

    def by_id(self, ident: str) -> Element:
        (found,) = [each for each in self.all() if each.attributes.get("id") == ident]
        return found

    def table(self, caption: str) -> list[list[str]]:
        """The cells of the table with this caption, its headings first."""
        (found,) = [each for each in self.all("table") if each.all("caption")[0].text == caption]
        return [[cell.text.strip() for cell in row.all("th", "td")] for row in found.all("tr")]

    def figures(self) -> dict[str, tuple[str, str]]:
        """Name -> (value, note) of the key figures."""
        return {
            each.all("dt")[0].text: (each.all("b")[0].text, " ".join(note.text for note in each.all("span")))
            for answer in self.all("dl")
            if answer.attributes.get("class") == "fb-figures"
            for each in answer.all("div")
        }


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, dict(attributes))
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(html: str) -> Element:
    """A document or fragment of which every tag is closed."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    (root,) = parser.open
    return root
