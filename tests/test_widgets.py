"""Questions and picture series are whole without a script: what is chosen decides what is shown."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from loupe_core import LoupeError
from loupe_lab.pages.plots import figure
from loupe_lab.pages.widgets import claim, frames, quiz


class Tags(HTMLParser):
    """Every tag with its attributes, in order; complains about what is not closed."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: outputs.append(data))
    return outputs


def three_figures():
    pictures = {}
    for value in (0, 0.05, 5):
        fig, ax = figure(size=(2, 1))
        ax.plot([0, 1], [0, value])
        pictures[str(value)] = (fig, f'a line up to "{value}" & no further')
    return pictures


def test_a_quiz_gives_every_answer_its_reason_and_marks_one_as_right(shown):
    quiz("How many `cells`?", {"196": "14 x 14", "784": "28 x 28", "<49>": "7 & 7"}, right="784")
    page = shown[0]["text/html"]
    tags = Tags(page)
    assert [p["class"] for p in tags.all("p")] == ["wrong", "right", "wrong"]
    assert {i["type"] for i in tags.all("input")} == {"radio"} and len({i["name"] for i in tags.all("input")}) == 1
    assert [label["for"] for label in tags.all("label")] == [i["id"] for i in tags.all("input")]
    assert not tags.all("script")
    assert "<code>cells</code>" in page and "&lt;49&gt;" in page and "7 &amp; 7" in page


def test_two_quizzes_on_a_page_do_not_share_their_buttons_and_a_second_run_gives_the_same_page(shown):
    for question in ("one", "two", "one"):
        quiz(question, {"a": "x", "b": "y"}, right="a")
    one, two, again = (output["text/html"] for output in shown)
    assert one == again
    assert not {i["id"] for i in Tags(one).all("input")} & {i["id"] for i in Tags(two).all("input")}


def test_a_quiz_whose_right_answer_is_missing_is_refused_in_a_build_and_whole_for_a_reader(shown, monkeypatch, capsys):
    with pytest.raises(LoupeError, match="the answer is one of 196, 784"):
        quiz("?", {"196": "", "784": ""}, right="49")
    monkeypatch.delenv("LOUPE_STRICT")
    quiz("?", {"196": "", "784": ""}, right="49")
    assert [p["class"] for p in Tags(shown[-1]["text/html"]).all("p")] == ["wrong", "wrong", "right"]
    assert capsys.readouterr().out == "This run differs from the text, which says: the answer is one of 196, 784.\n"


def test_a_claim_is_silent_where_it_holds_an_error_in_a_build_and_a_line_for_a_reader(monkeypatch, capsys):
    claim(True, "it is so")
    with pytest.raises(LoupeError, match="'it is so' does not hold"):
        claim(False, "it is so")
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("LOUPE_STRICT")
    claim(True, "it is so")
    claim(False, "it is so")
    assert capsys.readouterr().out == "This run differs from the text, which says: it is so.\n"


def test_frames_show_the_chosen_picture_alone(shown):
    frames("lambda", three_figures(), start="0.05")
    page = shown[0]["text/html"]
    tags = Tags(page)
    assert ["checked" in i for i in tags.all("input")] == [False, True, False]
    images = tags.all("img")
    assert [image["alt"] for image in images] == [alt for _, alt in three_figures().values()]
    for button, image in zip(tags.all("input"), images):
        kind = image["class"].split()[0]
        assert re.search(rf"#{button['id']}:checked ~ \.{kind} {{display: block}}", page)
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert picture.format == "WEBP" and picture.width > 100
    assert ".loupe-ask img {display: none" in page


@pytest.mark.parametrize("pictures, start", [({}, None), ("three", "0.5")])
def test_frames_without_the_first_picture_are_refused(pictures, start):
    with pytest.raises(LoupeError, match="expected one of"):
        frames("lambda", pictures and three_figures(), start)
