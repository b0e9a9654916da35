"""The options of `loupe train`, and what is chosen where none is given."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from loupe_core.errors import LoupeError
from loupe_core.files.run_folder import best_of
from loupe_core.gate import FORMS
from loupe_core.recipe import RECIPES, Recipe
from loupe_core.start.choose import default_backbone, default_form, default_recipe, is_drawn

TRAINING = """\
Train a gate and its backbone on your photographs, and keep the best model.

The folder holds one folder of photographs for each class, or such folders in train/, val/ and test/, or a set as it
is published: CUB-200-2011, NABirds, Stanford Cars, Stanford Dogs, FGVC-Aircraft, Oxford-IIIT Pet, Flowers-102 or
iNaturalist. The recipe and the backbone are chosen by what is there, and said in one line.

  loupe train photos --out runs/own
  loupe train photos --recipe probe --out runs/probe             what the frozen features give, in seconds
  loupe train photos --resume --out runs/own                     go on with a training that was stopped
  loupe train data/cub --download --backbone swin_base_patch4_window7_224.ms_in22k --out runs/cub       the paper's"""


def add_training(p: argparse.ArgumentParser) -> None:
    """All options, in groups."""
    p.usage = "loupe train FOLDER [--out FOLDER] [--recipe RECIPE] [options]"
    p.add_argument("data", type=Path, help="folder of the data set")
    p.add_argument("--out", type=Path, default=Path("runs/loupe"), help="folder for checkpoints and log")
    p.add_argument("--recipe", choices=("auto", *RECIPES), default="auto",
                   help="starting values of the recipe's options below; paper: for thousands of images; small: for "
                   "drawn birds on two cores; finetune: for a few hundred photographs; probe: the classifier alone, in "
                   "seconds; auto: by the number of images and the backbone")
    p.add_argument("--resume", action="store_true", help="go on after the last complete epoch in --out")
    p.add_argument("--overwrite", action="store_true", help="begin in the place of an earlier training in --out")
    p.add_argument("--save-every", type=int, default=1, metavar="N", help="keep a state after so many epochs, and "
                   "after the last: for a slow disk, or one that keeps what was removed, such as Google Drive")
    p.add_argument("--track", metavar="TRACKER", help="tensorboard, wandb, ...: also send every epoch's row there")
    group = p.add_argument_group("the photographs")
    group.add_argument("--labels", type=Path, metavar="CSV", help="a table of file names and labels (and splits), "
                       "where folders do not tell them")
    group.add_argument("--val-fraction", type=float, metavar="X", help="of the training images of each class, 0.1 if "
                       "it is not given")
    group.add_argument("--test-fraction", type=float, metavar="X", help="of all images of each class, 0.2 if it is "
                       "not given; for sets without a test split of their own")
    group.add_argument("--download", action="store_true", help="fetch CUB-200-2011 into the folder first (1.15 GB), "
                       "or the rest of it where an earlier download broke")
    group.add_argument("--cache", action="store_true", help="keep decoded images, at most 4 GiB, in a temporary file")
    group.add_argument("--check", action="store_true", help="first read every photograph, and list the bad ones")
    group = p.add_argument_group("the backbone")
    group.add_argument("--backbone", help="timm model name, hf-hub:owner/name or local-dir:FOLDER; if it is not given, "
                       "swin_micro for drawn birds and EfficientNet-Lite0 for photographs; the paper: "
                       "swin_base_patch4_window7_224.ms_in22k")
    group.add_argument("--from-scratch", action="store_true", help="random weights instead of pretrained ones")
    group.add_argument("--weights", type=Path, metavar="FILE", help="the backbone's pretrained weights from a file "
                       "(.safetensors or .pth, with timm's names), where no hub can be asked")
    group.add_argument("--init", type=best_of, metavar="CHECKPOINT", help="go on from a model of your own, with its "
                       "gates: more epochs, or other classes")
    group.add_argument("--img-size", type=int, metavar="PX", help="side of the images, in place of the backbone's own")
    group.add_argument("--in-chans", type=int, choices=(1, 3), help="1: grey images; 3 if it is not given")
    group.add_argument("--drop-path", type=float, metavar="RATE", help="stochastic depth (Huang et al. 2016)")
    group = p.add_argument_group("the gate")
    group.add_argument("--site", nargs="+", help="stage1..stage4, stage3.inside, ...; several: multi-scale; stage2 if "
                       "it is not given; the paper: stage2")
    group.add_argument("--form", choices=FORMS, help="how the mask meets the features; if it is not given, residual "
                       "with finetune, else multiply; the paper: multiply")
    group.add_argument("--reduction", type=int, help="hidden width of the gate: channels // reduction; 16 if it is "
                       "not given")
    group.add_argument("--bare", action="store_true", help="no gate: the baseline")
    _add_recipe(p)


def _add_recipe(p: argparse.ArgumentParser) -> None:
    """One option for each field of `Recipe`, made from its metadata; `Recipe` checks the values."""
    titles = dict(optimizer="how it learns", epochs="how long, and which epoch is kept", head="how it begins",
                  lam="what is minimised", augment="how photographs vary", precision="the machine")
    named = {name: Recipe.named(name) for name in RECIPES if name != "probe"}
    for f in dataclasses.fields(Recipe):
        if f.name in titles:
            group = p.add_argument_group(f"the recipe: {titles[f.name]}")
        paper = f"; the paper: {f.metadata['paper']}" if "paper" in f.metadata else ""
        values = [str(getattr(recipe, f.name)) for recipe in named.values()]
        default = values[0] if len(set(values)) == 1 else ", ".join(map(" ".join, zip(named, values)))
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata.get("choices"))
        names = ["--" + f.name.replace("_", "-"), *(["--freeze"] if f.name == "freeze_epochs" else [])]
        about = f"{f.metadata['about']}{paper}; default: {default}"
        group.add_argument(*names, default=argparse.SUPPRESS, help=about.replace("%", "%%"), **kind)


def choose(args: argparse.Namespace, begun: dict, images: int, class_names: Sequence[str] = ()) -> Recipe:
    """The recipe of a training; what the user left open, in `args` too, is chosen here, and said in one line.

    Args:
        begun: The configuration of the model that a training to go on with was begun with, or of the one in `--init`;
            else empty.
        images: Number of training images.
        class_names: The classes of now; where a model of `--init` knows them all, its classifier stays as it is.

    Raises:
        LoupeError: An option of the gate beside `--bare`; or as in `Recipe`.
    """
    if args.bare and not args.init and (given := [name for name in ("site", "form", "reduction")
                                                  if getattr(args, name) is not None]):
        raise LoupeError(f"found --bare and --{given[0]}, which is of a gate; expected one of them")
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    args.backbone = args.backbone or begun.get("backbone") or default_backbone(is_drawn(args.data))
    name, why = default_recipe(images, args.backbone, not args.from_scratch)
    if args.resume and (args.out / "recipe.json").is_file():
        name, why = None, "as it was begun"
    elif args.recipe != "auto":
        name, why = args.recipe, "as given"
    args.form = args.form or begun.get("form") or default_form(name)
    stood = begun.get("site", "stage2")
    args.site = args.site or ([stood] if isinstance(stood, str) else stood)
    args.reduction = begun.get("reduction", 16) if args.reduction is None else args.reduction
    args.bare = args.bare or name == "probe" and not args.init or not args.site  # a probe's gate would learn nothing
    if args.init and name not in (None, "probe") and set(begun.get("class_names") or ()) >= set(class_names):
        changes.setdefault("head", "new")
    print(f"recipe {name or 'of ' + str(args.out)}: {why}; backbone {args.backbone}, "
          + ("no gate" if args.bare else f"gate of the form {args.form}")
          + "; --recipe, --backbone and --form choose others")
    return Recipe.named(name, **changes) if name else Recipe.read(args.out / "recipe.json", **changes)
