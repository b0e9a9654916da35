"""The pictures of the README and of the book's first page, from the package, the recorded results and the built pages.

    python scripts/publish/pictures.py    # writes .github/pictures/*.webp and book/_static/control.webp

Needs the pages (`make book`) and Chromium.
"""

import io
from pathlib import Path

import matplotlib
import torch
from build_pdf import HTML, ROOT
from chromium import opened
from ledger import difference, mean
from matplotlib.figure import Figure
from PIL import Image

from loupe_core import LoupeModel, mask_to_original, overlay, transforms_for
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import SPECIES, draw
from loupe_lab.pages.plots import COLOURS, STYLE, figure

OUT = ROOT / ".github" / "pictures"
BIRDS = (2, 9, 17, 25, 33, 41)  # species, whose numbers are also the seeds, so that no picture is selected

# arm -> its label in the picture of the positive control
ARMS = {
    "residual, fast": "the gate, residual form",
    "oracle box": "a gate that is told the bird's box",
    "oracle crop": "the photograph cut to that box",
}
NETWORKS = {"EfficientNet-Lite0": ["cub10_lite0", "cub10_gates"], "ViT-S/14": ["cub10_vit_s"]}  # network -> its grids


def save(fig: Figure, name: str, folder: Path = OUT) -> None:
    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        fig.savefig(png, format="png", dpi=160)
    Image.open(png).convert("RGB").save(folder / f"{name}.webp", quality=85, method=6)


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


def control() -> None:
    """The positive control: accuracy of a gate and of two arms that are told the answer, minus that without a gate, on
    real photographs under the networks that are recorded; see chapter 14."""
    there = {network: grids for network, grids in NETWORKS.items()
             if all(difference(grids, {"arm": arm}, {"arm": "bare"}) for arm in ARMS)}
    fig, axes = figure(1, len(there), size=(10, 2.6), sharex=True, squeeze=False)
    for ax, (network, grids) in zip(axes[0], there.items()):
        for row, arm in enumerate(ARMS):
            number = difference(grids, {"arm": arm}, {"arm": "bare"})
            colour = COLOURS[arm.startswith("oracle")]
            ax.plot([number.low, number.high], [row, row], color=colour, linestyle="-", linewidth=2)
            ax.plot(number.mean, row, "o", color=colour)
        bare = mean(grids, {"arm": "bare"}, "accuracy", scale=100, digits=1)
        ax.axvline(0, color="0.3", linewidth=1)
        ax.set_yticks(range(len(ARMS)), ARMS.values() if ax is axes[0, 0] else [""] * len(ARMS))
        ax.set_title(f"{network}, without a gate {bare.mean:.1f} %")
        ax.set(xlabel="points of accuracy against no gate, 95 % interval", ylim=(len(ARMS) - 0.5, -0.5))
    save(fig, "control", ROOT / "book" / "_static")


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
    control()
    pages()
