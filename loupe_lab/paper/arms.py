"""What is trained: the arms, the backbones, and the tables of runs that answer the paper's claims.

An arm is a change of the model, of its mask or of the recipe; `Run` is one training of it. The same arms are trained on
drawn birds, see scripts/record/runs.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from loupe_core.errors import LoupeError

# Changes of the arguments of `LoupeModel` (model), of the mask (`control`), and of `Recipe` (recipe). `protocol`: what
# chooses the epoch, and with which photographs: None is the book's.
ARMS: dict[str, dict] = {
    "bare": dict(model=dict(site=())),
    "loupe": {},
    **{f"lambda {lam:g}": dict(recipe=dict(lam=lam)) for lam in (0, 0.01, 0.5, 5)},
    "l2": dict(recipe=dict(norm="l2")),
    "sum": dict(recipe=dict(norm_reduction="sum")),
    **{site: dict(model=dict(site=site)) for site in ("stage1", "stage3", "stage4", "stage3.inside")},
    "multi-scale": dict(model=dict(site=("stage1", "stage2", "stage3"))),
    **{f"reduction {r}": dict(model=dict(reduction=r)) for r in (4, 8)},
    **{kind: dict(control=kind) for kind in ("constant", "shuffled", "random", "centre", "cbam")},
    "mix": dict(model=dict(form="mix")),
    "residual": dict(model=dict(form="residual")),
}

# The authors' code: all training photographs, fp32, a cosine that moves once an epoch, no weight decay, hidden width
# C/4, bilinear resizing, a crop of 0.875 in evaluation; and the test split stops the training and chooses the epoch.
_AUTHORS = dict(protocol="authors", recipe=dict(precision="no", weight_decay=0.0, anneal="epoch"))
AUTHORS: dict[str, dict] = {
    "authors bare": _AUTHORS | dict(model=dict(site=())),
    "authors loupe": _AUTHORS | dict(model=dict(reduction=4)),
}
AUTHORS_DATA = dict(interpolation="bilinear", crop_pct=0.875)  # in place of the checkpoint's own

# The authors create the untagged models; those of today's timm are "base 22k-1k" and "tiny 1k".
BACKBONES = {
    "base 22k-1k": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "base 22k": "swin_base_patch4_window7_224.ms_in22k",
    "tiny 1k": "swin_tiny_patch4_window7_224.ms_in1k",
    "tiny 22k-1k": "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    "tiny 22k": "swin_tiny_patch4_window7_224.ms_in22k",
}
AT_384 = {
    "base 22k-1k": "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
    "base 22k": "swin_base_patch4_window12_384.ms_in22k",
}
PAPERS, PAPERS_TINY = "base 22k-1k", "tiny 1k"
MEASURED = ("bare", "loupe")  # the arms that are attacked as well

# table -> (backbone, arm, number of seeds)
TABLES: dict[str, list[tuple[str, str, int]]] = {
    "core": [(backbone, arm, 5) for backbone in (PAPERS, PAPERS_TINY) for arm in ("bare", "loupe")]
    + [(PAPERS, arm, 2) for arm in AUTHORS],
    "weights": [(backbone, arm, 5) for backbone in BACKBONES if backbone not in (PAPERS, PAPERS_TINY)
                for arm in ("bare", "loupe")],
    "ablations": [(PAPERS, arm, 3) for arm in ARMS if arm not in ("bare", "loupe", "sum", "reduction 8", "centre")],
}


class Run(NamedTuple):
    """One training: `backbone` is a key of `BACKBONES`, `arm` of `ARMS` or `AUTHORS`; images have `pixels` a side."""

    backbone: str
    pixels: int
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.backbone}_{self.pixels}_{self.arm}_{self.seed}".replace(" ", "-")

    @property
    def change(self) -> dict:
        """The arm's changes, see `ARMS`."""
        return (ARMS | AUTHORS)[self.arm]


def plan(table: str = "core", arms: Sequence[str] = (), backbones: Sequence[str] = (), seeds: int | None = None,
         pixels: int = 224) -> list[Run]:
    """The runs of a table, seed by seed, so that what is there after any number of them can be compared.

    Args:
        table: "core", "weights", "ablations" or "all".
        arms: In place of the table's arms.
        backbones: In place of the table's backbones, keys of `BACKBONES`; with `arms` alone, the paper's Swin-Base.
        seeds: In place of the table's number of seeds.
        pixels: 224; or 384, where a backbone has weights for it.

    Raises:
        LoupeError: A name is unknown, or nothing is left.
    """
    for option, given, known in (("--table", [table], [*TABLES, "all"]), ("--arm", arms, [*ARMS, *AUTHORS]),
                                 ("--backbone", backbones, BACKBONES)):
        if unknown := [name for name in given if name not in known]:
            raise LoupeError(f"{option} {unknown[0]!r}: unknown; expected some of: {', '.join(known)}")
    if pixels not in (224, 384):
        raise LoupeError(f"--pixels {pixels}: expected 224 or 384, for which there are pretrained weights")
    if seeds is not None and seeds < 1:
        raise LoupeError(f"--seeds {seeds}: expected 1 or more")
    arms, backbones = list(dict.fromkeys(arms)), list(dict.fromkeys(backbones))
    every = [row for rows in TABLES.values() for row in rows]
    rows = every if table == "all" else TABLES[table]
    if arms or backbones:
        most = {arm: max((n for _, other, n in every if other == arm), default=3) for arm in (ARMS | AUTHORS)}
        rows = [(backbone, arm, most[arm]) for backbone in (backbones or [PAPERS])
                for arm in (arms or dict.fromkeys(arm for _, arm, _ in rows))]
    known = AT_384 if pixels == 384 else BACKBONES
    counted = [(backbone, arm, seeds or n) for backbone, arm, n in rows if backbone in known]
    if not counted:
        raise LoupeError(f"--pixels {pixels}: found no run; there are weights for: {', '.join(known)}")
    return [Run(backbone, pixels, arm, seed) for seed in range(max(n for *_, n in counted))
            for backbone, arm, n in counted if seed < n]
