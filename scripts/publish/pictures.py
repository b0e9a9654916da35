"""The pictures of the README and of the book's first page, from the package, the recorded results and the built pages.

    python scripts/publish/pictures.py    # writes .github/pictures/*.webp and book/_static/*.webp

Needs the pages (`make book`) and Chromium.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from build_pdf import HTML, ROOT
from chromium import opened
from ledger import difference, mean
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from loupe_core import LoupeModel, mask_to_original, overlay, transforms_for
from loupe_core.model import FIELDGUIDE
from loupe_lab.birds.fieldguide import PART_OF, SPECIES, draw
from loupe_lab.birds.painter import PARTS
from loupe_lab.pages.plots import COLOURS, STYLE, figure

OUT = ROOT / ".github" / "pictures"
BIRDS = (2, 9, 17, 25, 33, 41)  # species, whose numbers are also the seeds, so that no picture is selected

TOUCHING = dict(left=0, right=1, bottom=0, top=1, wspace=0.01, hspace=0.01)  # of the pictures on a plate

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


def lens() -> None:
    """Two plates of the same drawn birds for the first page: as they are; and multiplied by the mask of the shipped
    Loupe, with a ring around the part in which each species differs from its neighbours."""
    model = LoupeModel.from_pretrained(FIELDGUIDE).eval()
    transform = transforms_for(model.data_config, train=False)
    plain, masked = (figure(2, 3, size=(9, 6), gridspec_kw=TOUCHING) for _ in range(2))
    for above, below, number in zip(plain[1].flat, masked[1].flat, BIRDS):
        bird = draw(SPECIES[number].attributes, seed=number, size=448)
        image = Image.fromarray(bird.image)
        x, geometry = transform(image)
        with torch.no_grad():
            mask = model(x[None], return_mask=True)[1]
        m = mask_to_original(mask[0, 0], geometry)
        above.imshow(image)
        below.imshow((bird.image * (m / np.nanmax(m))[..., None]).clip(0, 255) / 255)
        telling = PART_OF[SPECIES[number].differs_in]
        part = next(point for name, point in zip(PARTS, bird.parts) if name.endswith(telling) and point[2])
        for width, colour in ((5, "black"), (2.5, "white")):  # a ring that is seen on any colour
            below.add_patch(Circle(part[:2], 34, fill=False, linewidth=width, color=colour))
        seen_y, seen_x = (np.flatnonzero(~np.isnan(m).all(axis)) for axis in (1, 0))
        for ax in (above, below):
            ax.set(xlim=seen_x[[0, -1]], ylim=seen_y[[-1, 0]])
            ax.set_axis_off()
    for (fig, _), name in ((plain, "lens_birds"), (masked, "lens_masks")):
        fig.set_layout_engine("none")
        save(fig, name, ROOT / "book" / "_static")


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
            page.wait_for_function("!document.body.innerText.includes('Loading the network')", timeout=180_000)
            png = io.BytesIO(page.screenshot())
            Image.open(png).convert("RGB").resize((960, 645)).save(OUT / f"{name}.webp", quality=85, method=6)
            page.close()


if __name__ == "__main__":
    birds()
    lens()
    control()
    pages()
