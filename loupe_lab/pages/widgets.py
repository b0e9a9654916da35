"""Multiple-choice questions and series of figures that work on a published page without a kernel.

Both are plain HTML: radio buttons, and CSS rules that show what belongs to the chosen one. No script runs, so they
also work with the keyboard, with a screen reader, offline, and in a notebook that is not trusted. Where a kernel runs,
`claim` compares the results of a run with the text.
"""

import base64
import html
import io
import os
import re
import zlib

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from loupe_core.errors import LoupeError
from loupe_lab.pages.plots import STYLE, put_caption

# The colours of the text are the page's, light or dark; right and wrong are marked by a word and by a coloured bar.
_STYLE = """<style>
.loupe-ask {border: 1px solid currentColor; border-radius: 6px; padding: .8em 1em; margin: 1em 0; min-width: 0}
.loupe-ask legend {float: left; width: 100%; font-size: 1em; font-weight: 600; padding: 0; margin: 0 0 .3em}
.loupe-ask legend + * {clear: both}
.loupe-ask input {margin: .7em .5em .7em 0; width: 1.1em; height: 1.1em; vertical-align: middle}
.loupe-ask label {display: inline; cursor: pointer; padding: .5em 1em .5em 0}
.loupe-ask input:focus-visible + label {outline: 2px solid currentColor; outline-offset: 2px}
.loupe-ask p {display: none; margin: 0 0 .4em 1.8em; padding-left: .7em; border-left: 4px solid}
.loupe-ask p.right {border-color: #009E73}
.loupe-ask p.wrong {border-color: #D55E00}
.loupe-ask input:checked + label + p {display: block}
.loupe-ask img {display: none; max-width: 100%; height: auto; margin-top: .4em}
</style>"""


def claim(holds: bool, sentence: str) -> None:
    """Prints a line if a sentence of the text does not hold in this run, for example after a reader changed a number.

    Args:
        holds: whether the sentence holds; if so, nothing is printed.
        sentence: what the text says.

    Raises:
        LoupeError: it does not hold, and the environment variable LOUPE_STRICT is set, as in tests and builds.
    """
    if holds:
        return
    if os.environ.get("LOUPE_STRICT"):
        raise LoupeError(f"claim: found that {sentence!r} does not hold; expected what the chapter's text says")
    print(f"This run differs from the text, which says: {sentence}.")


def quiz(question: str, answers: dict[str, str], right: str) -> None:
    """Shows a multiple-choice question; the answer that the reader chooses is marked at once, with the reason.

    Args:
        question: plain text; text in `backticks` is set as code.
        answers: answer -> why it is right or wrong, in the order to show.
        right: the right answer, word for word, computed by a cell where possible. If it is not one of `answers`, a
            line says so (see `claim`) and it is added to them.

    Raises:
        LoupeError: `right` is not one of `answers`, and LOUPE_STRICT is set.
    """
    if right not in answers:
        claim(False, f"the answer is one of {', '.join(answers)}")
        answers = answers | {right: "This is what this run has computed."}
    name = _name("quiz", question, *answers)
    rows = []
    for i, (answer, why) in enumerate(answers.items()):
        kind, word = ("right", "Right.") if answer == right else ("wrong", "Not this one.")
        rows.append(f'<div><input type="radio" name="{name}" id="{name}-{i}"><label for="{name}-{i}">{_text(answer)}'
                    f'</label><p class="{kind}"><strong>{word}</strong> {_text(why)}</p></div>')
    _display(question, f'<div aria-live="polite">{"".join(rows)}</div>')


def frames(name: str, pictures: dict[str, tuple[Figure, str]], start: str | None = None, caption: str = "") -> None:
    """Shows one of several figures, which the reader chooses.

    Args:
        name: what is chosen, such as "lambda".
        pictures: label of the choice -> (figure, alternative text); figures of the same size.
        start: label of the figure to show at the beginning; None: the first.
        caption: of all of them; see `loupe_lab.pages.plots.put_caption`.

    Raises:
        LoupeError: `pictures` is empty or has no label `start`.
    """
    if not pictures or (start is not None and start not in pictures):
        raise LoupeError(f"frames: start={start!r}; expected one of {list(pictures)}")
    start = next(iter(pictures)) if start is None else start
    ident = _name("frames", name, *pictures)
    inputs, images, rules = [], [], []
    for i, (label, (figure, alt)) in enumerate(pictures.items()):
        checked = " checked" if label == start else ""
        inputs.append(f'<input type="radio" name="{ident}" id="{ident}-{i}"{checked}>'
                      f'<label for="{ident}-{i}">{_text(label)}</label>')
        data = base64.b64encode(_webp(figure)).decode()
        images.append(f'<img class="{ident}-{i} dark-light" alt="{html.escape(alt)}" '
                      f'src="data:image/webp;base64,{data}">')
        rules.append(f"#{ident}-{i}:checked ~ .{ident}-{i} {{display: block}}")
    _display(name, f"<div><style>{' '.join(rules)}</style>{''.join(inputs + images)}</div>")
    if caption:
        put_caption(caption)


def _display(title: str, body: str) -> None:
    from IPython.display import display

    page = f'{_STYLE}<fieldset class="loupe-ask"><legend>{_text(title)}</legend>{body}</fieldset>'
    display({"text/html": page, "text/plain": f"<{title}>"}, raw=True)


def _text(words: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(words))


def _name(*words: str) -> str:
    """A name for the group of buttons: the same in every run, different for different words."""
    return f"{words[0]}-{zlib.crc32('|'.join(words).encode()):08x}"


def _webp(figure: Figure) -> bytes:
    png, webp = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, format="png")
    Image.open(png).convert("RGB").save(webp, "webp", quality=88)
    return webp.getvalue()
