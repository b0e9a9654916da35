"""One style for the book's figures, and alt text that goes with each of them.

Colours are Okabe and Ito's (2008), told apart in grey and by colour-blind readers; lines differ in dash as well.
Figures bring their own white ground, so they read the same on a light and on a dark page.
"""

import io

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


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3), **kwargs):
    """A new figure in the book's style with its axes, outside pyplot: nothing to close, nothing shown twice."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=size)
        return fig, fig.subplots(rows, columns, **kwargs)


def show(fig: Figure, alt: str) -> None:
    """Displays `fig` in a notebook with `alt` as its alternative text, which the page build hands to the reader."""
    from IPython.display import display

    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(png, format="png", metadata={"Software": None})
    display({"image/png": png.getvalue(), "text/plain": "<figure>"}, raw=True, metadata={"image/png": {"alt": alt}})
