"""The style of the book's figures, their alternative texts and their captions.

The colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish; lines also differ in dash.
Figures have a white background, so they look the same on a light and on a dark page.
"""

import io
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#000000")

STYLE = {
    "figure.dpi": 110, "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))),
    "image.cmap": "viridis", "legend.frameon": False,
}


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3), **kwargs: Any) -> tuple[Figure, Any]:
    """A new figure in the book's style, `size` inches large, and its axes, as `Figure.subplots(**kwargs)` gives them.

    It is not registered with pyplot, so it need not be closed and is not shown twice.
    """
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=size)
        return fig, fig.subplots(rows, columns, **kwargs)


def show(fig: Figure, alt: str, caption: str = "") -> None:
    """Displays `fig` in a notebook, with `alt` as its alternative text there and on the built page.

    Args:
        alt: what a reader who does not see the figure should know of it.
        caption: see `put_caption`.
    """
    from IPython.display import display

    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(png, format="png", metadata={"Software": None})
    display({"image/png": png.getvalue(), "text/plain": "<figure>"}, raw=True, metadata={"image/png": {"alt": alt}})
    if caption:
        put_caption(caption)


def put_caption(text: str) -> None:
    """Displays the caption of the figure or widget that the cell has just shown; the built page numbers it.

    Args:
        text: what the figure shows and what to see in it, in one or two sentences of Markdown, formulas included.
    """
    from IPython.display import display

    # The build knows a caption by its metadata (scripts/publish/as_shown.py).
    display({"text/markdown": f"**Figure.** {text}", "text/plain": text}, raw=True, metadata={"caption": text})
