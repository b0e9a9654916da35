"""Which photographs of each class go to which split."""

import hashlib
import zlib

import numpy as np

from loupe_core.errors import LoupeError


def check_fractions(fractions: dict[str, float]) -> None:
    """Raises LoupeError where one of these, by their names, is not in [0, 1)."""
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise LoupeError(f"{name}: found {value}, expected a fraction in [0, 1), such as 0.1")


def cut_by_position(labels: np.ndarray, class_names: list[str], fraction: float, seed: int, purpose: str) -> np.ndarray:
    """Chooses a fraction of each class's images, by their positions: bool (N,). Label -1 is never chosen."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        # the legacy generator's stream is frozen, so a seed means the same cut under every NumPy
        random = np.random.RandomState([seed, zlib.crc32(f"{purpose} {name}".encode())])
        chosen[random.permutation(members)[: _count(len(members), fraction)]] = True
    return chosen


def cut_by_name(labels: np.ndarray, names: list[str], fraction: float, seed: int, purpose: str) -> np.ndarray:
    """As `cut_by_position`, by a hash of seed and name: a photograph more moves at most one other in its class."""
    rank = [hashlib.blake2b(f"{seed} {purpose} {name}".encode(errors="surrogatepass")).digest() for name in names]
    chosen = np.zeros(len(labels), dtype=bool)
    for label in range(labels.max(initial=-1) + 1):
        members = sorted(np.flatnonzero(labels == label), key=rank.__getitem__)
        chosen[members[: _count(len(members), fraction)]] = True
    return chosen


def _count(members: int, fraction: float) -> int:
    """How many of a class's images are chosen: never all, and at least one of two unless the fraction is 0."""
    return 0 if fraction == 0 else max(0, min(max(1, round(fraction * members)), members - 1))
