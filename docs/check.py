"""Read the built site as its readers do: every link leads somewhere, and no page complains in a browser.

In a headless Chromium, from files and without a network: no page says anything on the console, asks for what is not
there, is wider than a phone, or leaves an equation unset; and the interactive page answers to mouse, finger and keys.
"""

from __future__ import annotations

import html.parser
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import browser

Place = tuple[float, float]
PHONE, DESKTOP = (390, 844), (1280, 900)
PICTURED = (
    "docs/index.html",
    "docs/interactive.html",
    "docs/notes.html",
    "docs/api/flows.html",
    "docs/architecture.html",
    "tutorials/05-diffusion-models.html",
)
"""Pages whose pictures are made at both widths, light and dark."""


class Page(html.parser.HTMLParser):
    """The links of a page, and the places in it that can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.places = {"", "top"}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.add(value)
            elif name in ("id", "name") and value is not None:
                self.places.add(value)


def broken_links(site: Path) -> list[str]:
    """Links of any page to a file or a place of the site that is not there, or to elsewhere in plain http."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                if url.scheme not in ("https", "data", "mailto"):
                    broken.append(f"{path.relative_to(site)}: {link}")
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            place = urllib.parse.unquote(url.fragment)
            if not target.is_file() or (target in pages and place not in pages[target].places):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


# The theme hides what is too wide, so the page's own width says nothing. What scrolls by itself may be wide inside, and
# what MathJax writes for screen readers is not seen.
CUT_OFF = """[...document.querySelectorAll('article *')].filter(element => {
  const box = element.getBoundingClientRect();
  if (box.width === 0 || box.right <= innerWidth + 1 || element.closest('mjx-assistive-mml')) return false;
  for (let up = element.parentElement; up.tagName !== 'ARTICLE'; up = up.parentElement) {
    if (['auto', 'scroll'].includes(getComputedStyle(up).overflowX)) return false;
  }
  return true;
}).map(element => element.outerHTML.slice(0, 80)).slice(0, 3)"""


def complaints(page: browser.Browser, site: Path) -> list[str]:
    """The browser's errors on every page, without pages of source code, which are all alike."""
    found = []
    for path in sorted(site.rglob("*.html")):
        name = str(path.relative_to(site))
        if name.startswith(("_modules/", "_static/")) or name == "index.html":
            continue
        page.complaints.clear()
        page.size(*PHONE, phone=True)
        page.open(path.as_uri())
        found += [f"{name}: wider than a phone: {element}" for element in page.run(CUT_OFF)]
        unset = page.run("document.querySelectorAll('.math').length && !document.querySelector('mjx-container')")
        wrong = page.run("[...document.querySelectorAll('mjx-merror')].map(e => e.textContent).join('; ')")
        if unset or wrong:
            found.append(f"{name}: equations are not set: {wrong}")
        if page.run("[...document.images].some(image => image.complete && image.naturalWidth === 0)"):
            found.append(f"{name}: a picture is missing")
        found += [f"{name}: {text}" for text in page.complaints]
    return found


class Visit:
    """Somebody on the interactive page who tries what can be moved; `found` is what did not react.

    Args:
        name: of the visitor, in what is found.
        drag: how they drag: by mouse, or with a finger.
    """

    def __init__(self, page: browser.Browser, name: str, drag: Callable[[list[Place]], None]):
        self.page, self.name, self.drag = page, name, drag
        self.found: list[str] = []

    def everything(self) -> None:
        line = [(x / 10, 0.5) for x in range(3, 9)]
        self.try_drag("latent-map", ".map", [(0.5, 0.5), (0.4, 0.6), (0.25, 0.7)])
        self.try_drag("latent-map", "#latent-map input", line)
        self.page.run("document.querySelector('.map').focus()")
        for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
            self.expect("latent-map", key, lambda key=key: self.page.press(key))
        self.try_drag("forwards", "#forwards input", line)
        self.page.run(CHAIN_IS_DONE)
        self.try_drag("backwards", "#backwards input", line)
        self.try_drag("backwards", ".film", [(0.1, 0.5), (0.2, 0.5)])

    def try_drag(self, panel: str, selector: str, line: list[Place]) -> None:
        self.page.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y, width, height = self.page.run(
            f"(({{x, y, width, height}}) => [x, y, width, height])"
            f"(document.querySelector('{selector}').getBoundingClientRect())"
        )
        places = [(x + right * width, y + down * height) for right, down in line]
        self.expect(panel, f"a drag of {selector}", lambda: self.drag(places))

    def expect(self, panel: str, what: str, act: Callable[[], None]) -> None:
        """The panel's text and its last picture must both change."""
        before = self.state(panel)
        act()
        if any(old == new for old, new in zip(before, self.state(panel), strict=True)):
            self.found.append(f"docs/interactive.html, {self.name}: {what} changes nothing")

    def state(self, panel: str) -> list[str]:
        return self.page.run(
            f"(panel => [panel.querySelector('.says').textContent, "
            f"panel.querySelector('figure:last-child canvas').toDataURL()])(document.getElementById('{panel}'))"
        )


CHAIN_IS_DONE = """new Promise(done => {
  const look = () => document.querySelector('#backwards input').value === '0' ? done(1) : requestAnimationFrame(look);
  look();
})"""


def unanswered(page: browser.Browser, site: Path) -> list[str]:
    """The controls to which the interactive page does not react, on a phone and on a desktop."""
    found = []
    for name, size, drag in (("phone", PHONE, page.swipe), ("desktop", DESKTOP, page.drag)):
        page.size(*size, phone=name == "phone")
        page.open((site / "docs" / "interactive.html").as_uri())
        page.complaints.clear()
        visit = Visit(page, name, drag)
        visit.everything()
        found += visit.found + [f"docs/interactive.html, {name}: {text}" for text in page.complaints]
    return found


def take_pictures(page: browser.Browser, site: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURED:
        for width, height in (PHONE, DESKTOP):
            for dark in (False, True):
                page.size(width, height, phone=width == PHONE[0], dark=dark)
                page.open((site / name).as_uri())
                page.run("new Promise(done => setTimeout(done, 300))")
                stem = name.removesuffix(".html").replace("/", "-")
                page.picture(folder / f"{stem}-{width}-{'dark' if dark else 'light'}.png", whole=True)


def check(site: Path, pictures: Path | None = None) -> int:
    """Print what is wrong with the site; the number of complaints."""
    found = broken_links(site)
    chromium = browser.find()
    if chromium is None:
        print(f"links checked; there is no browser ({', '.join(browser.NAMES)}) to read the pages in")
    else:
        with browser.opened(chromium) as page:
            found += complaints(page, site) + unanswered(page, site)
            if pictures is not None:
                take_pictures(page, site, pictures)
    print("\n".join(found) or "every link leads somewhere, and no page complains")
    return len(found)
