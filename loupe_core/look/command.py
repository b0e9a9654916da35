"""The option `--magnify` of the commands, and what it prints."""

import argparse
from dataclasses import replace
from pathlib import Path

from torch.utils.data import Dataset

from loupe_core.errors import LoupeError
from loupe_core.files.card import accuracy
from loupe_core.look.boxes import Rule
from loupe_core.look.magnifier import Magnifier
from loupe_core.look.sources import source_names
from loupe_core.model import LoupeModel

# of `add_magnify`, beside --magnify: where argparse keeps each
OPTIONS = dict(share="--share", boxes="--boxes", pixels="--closer", magnify_site="--magnify-site")


def add_magnify(p: argparse.ArgumentParser, about: str) -> None:
    """The option `--magnify` and those of `OPTIONS`."""
    group, names = p.add_argument_group("a second look"), source_names()
    group.add_argument("--magnify", nargs="?", const="", choices=("", *names, "box"), metavar="SOURCE",
                       help=f"{about}; where to look: {', '.join(names)}, or box, the recorded one; without a name, "
                       "as in the training, else the mask")
    group.add_argument("--share", type=float, metavar="X", help="boxes hold the highest cells, so large a fraction of "
                       "them; 0.2 if it is not given")
    group.add_argument("--boxes", type=int, metavar="N", help="at most so many boxes per photograph; 1 if it is not "
                       "given")
    group.add_argument("--closer", type=int, metavar="PX", dest="pixels", help="side of the second look's input; as "
                       "the first's if it is not given")
    group.add_argument("--magnify-site", metavar="SITE", help="whose mask or features, where the model has several "
                       "gates")


def rule_of(args: argparse.Namespace, checkpoint: str | Path | None = None) -> Rule | None:
    """The rule that the options ask for, beginning with the one kept in a checkpoint; None without `--magnify`.

    Raises:
        LoupeError: One of the others without it; or as in `Rule`.
    """
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if args.magnify is None:
        if given:
            raise LoupeError(f"{OPTIONS[next(iter(given))]}: expected it together with --magnify")
        return None
    rule = (checkpoint and Rule.read(checkpoint)) or Rule()
    if args.magnify and args.magnify != rule.source:  # the kept site was of another source
        rule = replace(rule, source=args.magnify, site=None)
    return replace(rule, **{name.removeprefix("magnify_"): value for name, value in given.items()})


def for_card(shown: dict | None) -> str | None:
    """What a model card says of a training with `--magnify`.

    Args:
        shown: As `Magnified.shown`; None for a training without.
    """
    if not shown:
        return None
    rule = Rule(**{name: value for name, value in shown.items() if name not in ("crop", "drop")})
    where = "the recorded one" if rule.source == "box" else (
        f"around the highest {rule.share:.0%} of the cells of a map ({rule.source}) that the model itself makes before "
        "each epoch after the first")
    return (f"In training a photograph was shown whole; or, {shown['crop']:.0%} of the time, cut from the original to "
            f"a box; or, {shown['drop']:.0%} of the time, with that box covered by the mean colour. A box is {where}. "
            f"`loupe evaluate --magnify` takes a second look by the same rule ({rule}; magnify.json): it sends the "
            "part in the box through the network as well and combines the logits. Without `--magnify` there is one "
            "look.")


def two_looks(model: LoupeModel, data: Dataset, rule: Rule, split: str, batch_size: int = 16) -> list[str]:
    """Lines for `loupe evaluate`: the accuracy with both looks and with the second alone, in fp32.

    Args:
        data: Its transform makes the first look's input.

    Raises:
        LoupeError: As in `Magnifier`.
    """
    magnifier = Magnifier(model, rule)
    magnifier.transform = data.transform
    looks = magnifier.evaluate(data, batch_size)
    right = {name: int((getattr(looks, name).argmax(1).numpy() == looks.labels).sum()) for name in ("logits", "second")}
    n, shown = len(looks.labels), sum(len(boxes) for boxes in looks.boxes)
    return [f"with a second look by {rule}: {accuracy(split, right['logits'], n)}",
            f"the second look alone: {right['second'] / n:.4f}; {1 + shown / n:.1f} passes per photograph"]
