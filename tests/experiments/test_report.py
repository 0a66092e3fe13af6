"""A report stands alone: valid structure, its pictures inside, nothing fetched, nothing from a value read as markup."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup
from PIL import Image

from dgm_pyro import plots
from dgm_pyro.experiments import report

VOID = {"meta", "link", "img", "source", "br", "hr"}


class Page(HTMLParser):
    """Elements in order, and a check that each is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def drawn():
    return report.picture(
        "losses", lambda: plots.curves([0, 1], {"loss": {"a": [1, 2]}}, xlabel="epoch"), alt="A line.", caption="Rises."
    )


@pytest.fixture
def example(drawn):
    columns = [report.Column("program", "what was trained"), report.Column("bits/dim", "lower is better", numeric=True)]
    rows = [
        [report.TableCell("counted <b>pixels</b>"), report.TableCell("2.23", "± 0.01")],
        [report.TableCell("VAE"), report.TableCell("2.01", strong=True)],
    ]
    part = report.Section("A part", "part", pictures=[drawn])
    section = report.Section("A family & friends", "family", Markup("p(<i>x</i>)"), ["plain < text"], parts=[part])
    return report.Report(
        "The title", "The lead.", report.PageTable(columns, rows, frozenset({0})), [section], ["Careful."],
        {"seed": "0"}, {"Do this:": "dgm list"},
    )  # fmt: skip


def test_the_page_is_whole_and_every_heading_is_linked(example):
    text = report.render(example)
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    targets = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    links = {attrs["href"].removeprefix("#") for attrs in page.all("a")}
    assert {"results", "family"} <= links <= targets
    assert "family-part" in targets
    words = " ".join(page.words)
    for expected in ("The title", "The lead.", "Careful.", "lower is better", "± 0.01", "dgm list", "Rises.", "seed"):
        assert expected in words


def test_nothing_is_fetched_from_elsewhere(example):
    text = report.render(example)
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert "<script" not in text
    for attrs in Page(text).all("img"):
        assert attrs["src"].startswith("data:image/png;base64,")


def test_values_are_escaped_and_formulas_are_not(example):
    text = report.render(example)
    assert "counted &lt;b&gt;pixels&lt;/b&gt;" in text
    assert "plain &lt; text" in text
    assert "p(<i>x</i>)" in text


def test_the_table_is_one_for_screen_readers(example):
    page = Page(report.render(example))
    scopes = [attrs.get("scope") for attrs in page.all("th")]
    assert scopes == ["col", "col", "row", "row"]
    assert [attrs.get("class") for attrs in page.all("tr")] == [None, "reference", None]
    assert [attrs["class"] for attrs in page.all("td")] == ["number", "number"]


def test_a_picture_is_drawn_in_both_themes_and_saved_in_light(drawn, tmp_path):
    sources = drawn.sources
    for theme in plots.THEMES:
        content = base64.b64decode(sources[theme].removeprefix("data:image/png;base64,"))
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        corner = "#{:02x}{:02x}{:02x}".format(*picture.getpixel((0, 0)))
        assert corner == plots.THEMES[theme].paper
        assert picture.width == round(plots.WIDTH * plots.DPI)
    assert drawn.save(tmp_path).read_bytes() == drawn.light


def test_the_dark_picture_and_the_dark_colors_share_one_condition(example):
    text = report.render(example)
    (source,) = Page(text).all("source")
    assert source["media"] == "(prefers-color-scheme: dark)"
    dark = text.split("@media (prefers-color-scheme: dark)")[1][:300]
    assert plots.THEMES["dark"].paper in dark


def test_every_picture_has_a_text_in_its_place(example):
    assert [attrs["alt"] for attrs in Page(report.render(example)).all("img")] == ["A line."]


def test_pictures_of_parts_are_found(example, drawn):
    assert example.sections[0].all_pictures() == [drawn]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 0 has 2 cells, but there are 1 columns"):
        report.PageTable([report.Column("a", "b")], [[report.TableCell("1"), report.TableCell("2")]])


def test_writing_replaces_the_file_and_leaves_no_other(example, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(example, path)
    assert path.read_text(encoding="utf-8") == report.render(example)
    assert list(tmp_path.iterdir()) == [path]
