"""Problems of a built site: dead links and anchors, empty headings, blank pictures, what is fetched from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

from PIL import Image

HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
SHAPES = {"rect", "path", "circle", "line", "polyline", "polygon", "ellipse", "text"}


class Page(HTMLParser):
    """What matters of one page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.fetched, self.headings = set(), [], [], [], []
        self._heading = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.images.append((given.get("src", ""), given.get("alt", "")))
        if tag in ("script", "link", "img", "iframe", "source"):
            self.fetched += [given[name] for name in ("src", "href", "srcset") if given.get(name)]
        if tag in HEADINGS:
            self._heading = ""

    def handle_endtag(self, tag):
        if tag in HEADINGS and self._heading is not None:
            self.headings.append(self._heading)
            self._heading = None

    def handle_data(self, data):
        if self._heading is not None:
            self._heading += data


def problems(root: Path) -> list[str]:
    """One line for each, over all pages below `root`; 404.html is for a server, and has paths from its root."""
    pages = {path: Page(path.read_text()) for path in sorted(root.rglob("*.html")) if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        name = path.relative_to(root)
        found += [f"{name}: a heading without text" for heading in page.headings if not heading.strip(" ¶\n")]
        for link in page.links:
            target, anchor = resolve(path, link)
            if target is None:
                continue
            if not target.exists():
                found.append(f"{name}: dead link {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                found.append(f"{name}: dead anchor {link}")
        for source, alt in page.images:
            target, _ = resolve(path, source)
            if target is None or not target.exists():
                found.append(f"{name}: no picture {source}")
            elif is_blank(target):
                found.append(f"{name}: the picture {source} is blank")
            if not alt:
                found.append(f"{name}: the picture {source} has no alternative text")
        found += [f"{name}: fetches {url}" for url in page.fetched if urlsplit(url).netloc]
    return found


def resolve(page: Path, link: str) -> tuple[Path | None, str]:
    """The file and the anchor that a link means; None for one to another site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None, ""
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    return (target / "index.html" if target.is_dir() else target), unquote(parts.fragment)


def is_blank(path: Path) -> bool:
    """Whether all pixels have one colour, or an SVG draws nothing but its background."""
    if path.suffix == ".svg":
        drawn = [element for element in ElementTree.parse(path).iter() if element.tag.rpartition("}")[2] in SHAPES]
        return len(drawn) < 3
    with Image.open(path) as picture:
        return all(low == high for low, high in picture.convert("RGB").getextrema())
