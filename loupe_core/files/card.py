"""The figures of a model in words, for the console and for its card."""

import math
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from loupe_core.datasets import CUB200, PhotoFolder
from loupe_core.errors import LoupeError
from loupe_core.files.atomic import write_whole


def accuracy(split: str, right: int, n: int) -> str:
    """For example: test accuracy 0.8950 (358 of 400 images; 95 % interval 0.8611 to 0.9214, Wilson)."""
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    return f"{split} accuracy {right / n:.4f} ({right} of {n} images; 95 % interval {low:.4f} to {high:.4f}, Wilson)"


def worth(labels: np.ndarray, num_classes: int) -> str:
    """What an accuracy is to be compared with: chance, and always naming the largest class."""
    return f"chance {1 / num_classes:.4f}, the largest class alone {np.bincount(labels).max() / len(labels):.4f}"


def area_seen(data: CUB200 | PhotoFolder) -> str:
    """How much of the photographs the transform of `data` shows, on average over 32 of them."""
    areas = []
    for i in range(0, len(data), -(-len(data) // 32)):
        geometry = data[i].geometry
        x0, y0, x1, y1 = geometry.visible_box()
        areas.append((x1 - x0) * (y1 - y0) / math.prod(geometry.original_size))
    return f"it sees {np.mean(areas):.0%} of a photograph"


def epoch_line(row: dict) -> str:
    """An epoch's row as `Trainer.fit` gives it, with validation, in one line."""
    return (f"epoch {row['epoch']:>3}   loss {row['loss']:.4f}   validation loss {row['val_loss']:.4f}, accuracy "
            f"{row['val_accuracy']:.4f}   mean of the mask {row['val_mask_mean']:.3f}   {row['seconds']:.0f} s")


def add_to_card(file: Path, line: str) -> None:
    """Puts a line below the card's "## Metrics", in place of an earlier one of its split."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise LoupeError(f"--card: {file} could not be read ({error.strerror}); expected a training's folder") from None
    kept = [old for old in text.splitlines() if not old.startswith(line[: line.index(" accuracy")])]
    if "## Metrics" not in kept:
        raise LoupeError(f"--card: {file} has no line '## Metrics'; expected the model card that a training wrote")
    at = kept.index("## Metrics") + 1
    write_whole(file, "\n".join([*kept[:at], "", line, *kept[at + (kept[at : at + 1] == [""]):]]) + "\n")
