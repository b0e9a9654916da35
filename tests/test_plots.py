"""Figures carry alt text, and their lines differ in more than colour."""

import io

from matplotlib.image import imread

from loupe_lab.pages.plots import COLOURS, STYLE, figure, show


def test_show_hands_over_png_and_alt_text(monkeypatch):
    shown = {}
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.update(data=data, **kwargs))
    fig, axes = figure(1, 2)
    axes[0].plot([0, 1], [1, 0])
    show(fig, "A line that falls.")
    assert imread(io.BytesIO(shown["data"]["image/png"])).shape[2] == 4
    assert shown["metadata"]["image/png"]["alt"] == "A line that falls." and shown["data"]["text/plain"] == "<figure>"


def test_a_caption_stands_below_its_figure_and_is_known_by_its_metadata(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.append((data, kwargs["metadata"])))
    show(figure(1, 1)[0], "A line that falls.", caption="The line falls, as $1/t$.")
    (picture, _), (words, metadata) = shown
    assert "image/png" in picture and words["text/markdown"].endswith("The line falls, as $1/t$.")
    assert metadata == {"caption": words["text/plain"]} == {"caption": "The line falls, as $1/t$."}


def test_colours_differ_in_grey_and_lines_in_dash():
    def grey(code):
        return sum(w * int(code[i:i + 2], 16) for w, i in zip((0.299, 0.587, 0.114), (1, 3, 5)))

    first = [grey(code) for code in COLOURS[:2]] + [grey(COLOURS[-1])]
    assert min(abs(a - b) for i, a in enumerate(first) for b in first[:i]) > 25
    styles = [str(entry["linestyle"]) for entry in STYLE["axes.prop_cycle"]]
    assert len(set(styles)) == len(styles)
