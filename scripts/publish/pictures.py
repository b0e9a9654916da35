"""The README's pictures, from the package, the recorded results and the built pages.

    python scripts/publish/pictures.py    # writes .github/pictures/*.webp

Needs the pages (`make book`) and Chromium.
"""

import io

import matplotlib
import torch
from build_pdf import HTML, ROOT
from chromium import opened
from ledger import difference
from matplotlib.figure import Figure
from PIL import Image

from loupe_core import LoupeModel, mask_to_original, overlay, transforms_for
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import SPECIES, draw
from loupe_lab.pages.plots import COLOURS, STYLE, figure

OUT = ROOT / ".github" / "pictures"
BIRDS = (2, 9, 17, 25, 33, 41)  # species, whose numbers are also the seeds, so that no picture is selected

# arm of data/results/ablations.csv -> its label in the plot
ARMS = {
    "loupe": "the gate",
    "constant": "one constant in its place",
    "shuffled": "its own mask, cells shuffled",
    "cbam": "CBAM",
    "lambda 0": "the gate without penalty",
    "lambda 5": "the gate at lambda 5",
}
PAPER = 2.66  # percentage points, from its abstract


def save(fig: Figure, name: str) -> None:
    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(png, format="png", dpi=160)
    Image.open(png).convert("RGB").save(OUT / f"{name}.webp", quality=85, method=6)


def birds() -> None:
    """Drawn birds, each with the mask of the shipped Loupe."""
    model = LoupeModel.from_pretrained(FIELDGUIDE).eval()
    transform = transforms_for(model.data_config, train=False)
    fig, axes = figure(2, len(BIRDS), size=(10, 3.6))
    for (above, below), number in zip(axes.T, BIRDS):
        image = Image.fromarray(draw(SPECIES[number].attributes, seed=number, size=224).image)
        x, geometry = transform(image)
        with torch.no_grad():
            logits, mask = model(x[None], return_mask=True)
        above.imshow(image)
        below.imshow(overlay(image, mask_to_original(mask[0, 0], geometry)))
        below.set_xlabel(model.class_names[logits.argmax()].split(".")[-1].replace("_", "\n", 1).replace("_", " "),
                         fontsize=9)
        for ax in (above, below):
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
    save(fig, "birds")


def results() -> None:
    """Accuracy of some arms minus that of the network without a gate, with intervals, and the paper's gain."""
    fig, ax = figure(size=(10, 3.2))
    for row, arm in enumerate(ARMS):
        number = difference("ablations", {"arm": arm}, {"arm": "bare"})
        ax.plot([number.low, number.high], [row, row], color=COLOURS[0], linestyle="-", linewidth=2)
        ax.plot(number.mean, row, "o", color=COLOURS[0])
    ax.axvline(0, color="0.3", linewidth=1)
    ax.axvline(PAPER, color=COLOURS[1], linestyle="--")
    ax.text(PAPER + 0.3, len(ARMS) - 1.6, f"the paper, CUB with\nSwin-Base: +{PAPER}", color=COLOURS[1], va="center",
            fontsize=9)
    ax.set_yticks(range(len(ARMS)), ARMS.values())
    ax.set(xlabel="points of accuracy against no gate, 95 % interval over seeds (400 drawn birds each)", xlim=(-22, 8))
    ax.invert_yaxis()
    save(fig, "results")


def pages() -> None:
    """Screenshots of three pages of the book."""
    shown = dict(chapter=("04_the_loupe", "h1"), heatmaps=("06_heatmaps", "[id^=explorer-]"), try_it=("try_it", "#lab"))
    with opened(HTML) as (browser, address):
        for name, (file, element) in shown.items():
            page = browser.new_page(viewport=dict(width=1280, height=860), color_scheme="light")
            page.goto(f"{address}{file}.html", wait_until="load")
            page.locator(element).first.evaluate("e => scrollTo(0, e.getBoundingClientRect().top + scrollY - 70)")
            page.wait_for_timeout(5000)  # explorer and lab start when they become visible
            png = io.BytesIO(page.screenshot())
            Image.open(png).convert("RGB").resize((960, 645)).save(OUT / f"{name}.webp", quality=85, method=6)
            page.close()


if __name__ == "__main__":
    birds()
    results()
    pages()
