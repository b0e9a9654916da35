"""The model that a training begins with: a new one on its backbone, or a trained one with classes of now."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from loupe_core.errors import LoupeError
from loupe_core.files.hub import hub_or_cache
from loupe_core.model import LoupeModel
from loupe_core.sites import classifiers
from loupe_core.start.layers import is_timms


def first_model(args: argparse.Namespace, class_names: Sequence[str], begun: dict,
                init: LoupeModel | None = None) -> LoupeModel:
    """The model of `loupe train`, with its options.

    Args:
        args: Its options, after `choose` has filled them.
        begun: The configuration that a training to go on with was begun with; else empty.
        init: What `open_init` gave: it is changed and returned.

    Raises:
        LoupeError: As in `LoupeModel`; or options that exclude each other.
    """
    if init is not None:
        if (kept := with_classes(init, class_names)) < len(class_names):
            print(f"--init: {kept} of {len(class_names)} classes are known to {args.init}; the others begin anew")
        return init
    if args.drop_path is not None and not 0 <= args.drop_path < 1:
        raise LoupeError(f"--drop-path {args.drop_path}: expected a rate in [0, 1), such as 0.1")
    if args.weights and args.from_scratch:
        raise LoupeError("found --weights and --from-scratch; expected one of them")
    # What a training was begun with is named by the architecture alone, which knows neither size nor mean of a tag.
    stood = begun if begun.get("backbone") == args.backbone else {}
    options = dict(stood.get("backbone_kwargs") or {})
    for name, value in (("drop_path_rate", args.drop_path), ("in_chans", args.in_chans)):
        if value:
            options[name] = value
    if args.weights:
        options["pretrained_cfg_overlay"] = dict(file=str(args.weights))
    images = {} if args.img_size or args.in_chans else {k: stood[k] for k in ("img_size", "data_config") if k in stood}
    images |= dict(img_size=_side(args.img_size)) if args.img_size is not None else {}
    # a state to go on with has all weights, and needs none from elsewhere
    has_state = args.resume and any((args.out / "states").glob("epoch-*"))
    return LoupeModel(args.backbone, num_classes=len(class_names), pretrained=not (args.from_scratch or has_state),
                      class_names=class_names, site=() if args.bare else args.site[0] if len(args.site) == 1 else
                      args.site, form=args.form, reduction=args.reduction, backbone_kwargs=options, **images)


def open_init(args: argparse.Namespace) -> LoupeModel | None:
    """The trained model in `--init`, with another size of images where `--img-size` asks for it; None without one.

    Raises:
        LoupeError: It cannot be read; or an option asks for another backbone or gate than it has.
    """
    if args.init is None:
        return None
    hub_or_cache(args.init)
    size = {} if args.img_size is None else dict(img_size=_side(args.img_size))
    try:
        model = LoupeModel.from_pretrained(args.init, **size)
    except LoupeError as error:
        if not size:
            raise
        raise LoupeError(f"--img-size {args.img_size}, for the model in --init: {error}") from error
    there = dict(backbone=model.backbone_name, site=list(model.sites), form=model.form, reduction=model.reduction,
                 in_chans=model.in_chans, drop_path=model.backbone_kwargs.get("drop_path_rate"),
                 bare=list(model.sites) or True, from_scratch="weights", weights="weights")
    for name, value in there.items():
        given = getattr(args, name)
        if given not in (None, False) and given != value:
            option = "--" + name.replace("_", "-")
            raise LoupeError(f"{option}{'' if given is True else ' ' + _said(given)}: found {_said(value)} in "
                             f"{args.init}, whose backbone and gates --init keeps; expected the same: leave {option} "
                             "out")
    return model


def with_classes(model: LoupeModel, class_names: Sequence[str]) -> int:
    """Gives a trained model, in place, a classifier for these classes; returns how many of them it knew by name.

    What the classifier has learnt of a class that it knows goes along, whatever the order; a class that is new begins
    at random. With the same names in the same order nothing changes.

    Raises:
        LoupeError: The backbone is not timm's, which alone can grow another head.
    """
    names, known = list(class_names), model.class_names or []
    rows = [(k, known.index(name)) for k, name in enumerate(names) if name in known]
    if names == known:
        return len(names)
    if not is_timms(model.backbone):
        raise LoupeError(f"{model.backbone_name} is no classifier from timm; expected the classes that it was trained "
                         f"on, {', '.join(known[:3])}, ...: replace its head yourself")
    count, before = model.num_classes, [module.state_dict() for module in classifiers(model.backbone)]
    model.backbone.reset_classifier(len(names))
    with torch.no_grad():
        for module, old in zip(classifiers(model.backbone), before):
            for name, value in module.state_dict().items():  # views of the parameters
                if value.ndim and len(old[name]) == count and len(value) == len(names):
                    for new_row, old_row in rows:
                        value[new_row] = old[name][old_row]
                elif value.shape == old[name].shape:
                    value.copy_(old[name])
    model.num_classes, model.class_names = len(names), names
    return len(rows)


def _side(pixels: int) -> int:
    if pixels < 1:
        raise LoupeError(f"--img-size {pixels}: expected a whole number of pixels from 1")
    return pixels


def _said(value: object) -> str:
    """An option's value as one would write it."""
    if isinstance(value, list):
        return " ".join(value) or "no gate"
    return "none" if value is None else str(value)
