"""The command line: `loupe train | evaluate | export`, and the commands that other packages add.

A package adds commands by an entry point of the group `loupe.commands`: a function that is handed `command` (see
`parser`) and the parsers of all commands by their names; `evaluate` calls the functions in its default `then` at its
end. `loupe_lab` adds explain, predict, audit, reproduce, fieldguide and `evaluate --report`. Every command says in one
line what is wrong with its input, and then exits with code 2.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import torch
from tqdm import tqdm

from loupe_core.datasets import CUB200, SPLITS, PhotoFolder, open_set
from loupe_core.errors import LoupeError
from loupe_core.files.atomic import write_whole
from loupe_core.files.card import accuracy, add_to_card, area_seen, epoch_line, worth
from loupe_core.files.checks import check_photographs
from loupe_core.files.console import Parser, exit_code
from loupe_core.files.download import download_cub
from loupe_core.files.hub import hub_or_cache
from loupe_core.files.run_folder import best_of, run_of, trained_on
from loupe_core.geometry import transforms_for
from loupe_core.look.command import add_magnify, for_card, rule_of, two_looks
from loupe_core.look.export import export_looks
from loupe_core.look.training import Magnified
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.start.first import first_model, open_init
from loupe_core.start.options import TRAINING, add_training, choose
from loupe_core.trainer import Trainer

Arguments = argparse.Namespace
EXAMPLES = """\
loupe train photos --out runs/own                      one folder of photographs for each class
loupe evaluate photos --checkpoint runs/own            how often it is right on photographs it has not seen
loupe explain photo.jpg --checkpoint runs/own          where its mask lies
loupe train --help                                     every option of a command"""


def train(args: Arguments) -> None:
    """Trains, and keeps the best model with its card in `--out`."""
    if args.download:
        download_cub(args.data)
    begun = run_of(args.out) if args.resume else {}
    # The splits keep their own default seed: `evaluate` must find the test images that `train --seed 3` never saw.
    given = dict(val_fraction=args.val_fraction, test_fraction=args.test_fraction)
    cut = begun.get("cut", {}) | {name: value for name, value in given.items() if value is not None}
    data = open_set(args.data, "train", cache=args.cache, labels=args.labels, **cut)
    print(data.describe())
    check_photographs(args.data, data.all_paths, read=args.check)
    if len(data.class_names) < 2:
        raise LoupeError(f"{args.data}: found one class only, {data.class_names[0]!r}; expected two or more, a folder "
                         "of photographs for each")
    if same := data.duplicates():
        listed = "; ".join(f"{a} = {b}" for a, b in same[:5]) + ("; ..." if len(same) > 5 else "")
        print(f"warning: {len(same)} pairs of photographs with the same content lie in two splits: {listed}")
    init = open_init(args)
    before = begun.get("model") or (init.config if init else {})
    recipe = choose(args, before, len(data), data.class_names)
    torch.manual_seed(recipe.seed)  # of the gate's and the classifier's initial weights
    model = first_model(args, data.class_names, before, init)
    data.transform = transforms_for(model.data_config, **recipe.train_transform_options())
    val = data.with_split("val", transforms_for(model.data_config, train=False))
    trainer = Trainer(model, recipe, args.out, tracker=args.track, save_every=args.save_every)
    accelerator = trainer.accelerator
    print(f"{len(data)} training and {len(val)} validation images of {len(data.class_names)} classes, {args.backbone}, "
          f"precision {accelerator.mixed_precision}, {accelerator.device}")
    seen = data if (rule := rule_of(args)) is None else Magnified(data, model, rule)
    rows = trainer.fit(seen, val, resume=args.resume, overwrite=args.overwrite,
                       on_epoch_end=lambda row: tqdm.write(epoch_line(row)))
    if accelerator.is_main_process:
        _tell(args, model, trainer, rows, len(data), len(val), for_card(getattr(seen, "shown", None)))
        if rule:
            rule.write(args.out / "best")


def _tell(args: Arguments, model: LoupeModel, trainer: Trainer, rows: list[dict], train: int, val: int,
          magnify: str | None) -> None:
    """Writes the model card of a training, and prints what came out."""
    best = trainer.best or min(rows, key=lambda row: row["val_loss"])  # a state of before November 2026 has no `best`
    chosen = accuracy("validation", round(best["val_accuracy"] * val), val)
    card = model.generate_model_card(
        backbone=f"{model.backbone_name}, gate at {', '.join(model.sites) or 'no site'} ({args.form})",
        data=f"{args.data.resolve().name}: {train} training images of {model.num_classes} classes.",
        recipe=dataclasses.asdict(trainer.recipe) | dict(epochs_trained=len(rows), best_epoch=best["epoch"]),
        metrics=[chosen + "; it chose the epoch, so it is a little optimistic"], magnify=magnify)
    write_whole(args.out / "best" / "README.md", str(card))
    which = f"best of {len(rows)} epochs: {best['epoch']}"
    if best["epoch"] == 0:
        which = "best: the linear probe" + (f", as none of {len(rows)} epochs was better" if rows else "")
    print(f"{which}, validation loss {best['val_loss']:.4f}, accuracy {best['val_accuracy']:.4f}")
    labels = ["--labels", str(args.labels)] if args.labels else []
    words = ["loupe", "evaluate", str(args.data), *labels, "--checkpoint", str(args.out / "best")]
    print(f"kept in {args.out / 'best'}; next: {shlex.join(words)}")


def evaluate(args: Arguments) -> None:
    """Prints accuracy with its interval, what it is worth, loss and mean of the mask on one split."""
    recipe = Recipe(batch_size=args.batch_size, precision=args.precision)
    model, data = open_trained(args)
    trainer = Trainer(model, recipe)
    result = trainer.evaluate(data)
    found = accuracy(args.split, int((result.predictions == result.labels).sum()), len(result.labels))
    lines = [found, f"beside it: {worth(result.labels, model.num_classes)}; precision "
             f"{trainer.accelerator.mixed_precision.replace('no', 'fp32')}; {area_seen(data)}",
             f"loss {result.loss:.4f}   " + (f"mean of the mask {result.mask_mean:.4f}" if model.sites else "no mask")]
    if rule := rule_of(args, args.checkpoint):
        lines += two_looks(model, data, rule, args.split, args.batch_size)
    print("\n".join(lines))
    if args.card:
        for line in (*lines[3:4], found):  # where there is a second look, with both
            add_to_card(Path(args.checkpoint) / "README.md", f"- {line}")
    for step in args.then:
        step(args, model, data, lines)


def export(args: Arguments) -> None:
    """Writes the ONNX file, or two where a second look has another size."""
    hub_or_cache(args.checkpoint)
    for file in export_looks(LoupeModel.from_pretrained(args.checkpoint), args.out, rule_of(args, args.checkpoint)):
        print(f"ONNX: {file} ({file.stat().st_size / 1e6:.1f} MB)")


def open_trained(args: Arguments) -> tuple[LoupeModel, CUB200 | PhotoFolder]:
    """The model in `--checkpoint`, and `--split` of the data set: all classes of the training, or some of them.

    Raises:
        LoupeError: A class is unknown to the model; or as in `LoupeModel.from_pretrained` and `open_set`.
    """
    hub_or_cache(args.checkpoint)
    model = LoupeModel.from_pretrained(args.checkpoint)
    whole = dict(crop_mode="border", crop_pct=1.0) if getattr(args, "whole", False) else {}
    data = open_set(args.data, args.split, transform=transforms_for(model.data_config, train=False, **whole),
                    labels=args.labels, **run_of(args.checkpoint).get("cut", {}))
    if model.class_names:
        data.relabel(model.class_names)
    parts = {"train": (), "val": ("train",)}.get(args.split, ("train", "val"))
    if seen := data.leave_out(trained_on(args.checkpoint, *parts)):
        listed = ", ".join(seen[:3]) + (", ..." if len(seen) > 3 else "")
        split = "" if args.split == "all" else f"{args.split} "
        print(f"left out: {len(seen)} {split}photographs that this model was trained on or chosen by ({listed})"
              + ("" if args.split == "all" else "; were photographs added since?"))
    if len(data) == 0:
        raise LoupeError(f"{args.data}: found no {args.split} photograph that {args.checkpoint} was not trained on or "
                         "chosen by; expected some")
    check_photographs(args.data, data.paths)
    return model, data


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Paragraphs stay as they are written, and a default is told where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def add_checkpoint(p: argparse.ArgumentParser, required: bool = True) -> None:
    """The option `--checkpoint`."""
    p.add_argument("--checkpoint", required=required, type=best_of,
                   help="folder of a training, or one that save_pretrained wrote, or owner/name on the hub")


def add_data(p: argparse.ArgumentParser) -> None:
    """The data set's folder, which comes first, and the option `--split`."""
    p.add_argument("data", type=Path, help="folder of the data set")
    p.add_argument("--split", choices=(*SPLITS, "all"), default="test", help="which split; all: all of a folder")
    p.add_argument("--labels", type=Path, metavar="CSV", help="the table of labels, where the training had one")


def parser() -> argparse.ArgumentParser:
    """All commands: the core's own, and those of every installed entry point of the group `loupe.commands`."""
    top = Parser(prog="loupe", description="Train a spatial attention gate; look through it.", epilog=EXAMPLES,
                  formatter_class=_Help)
    top.add_argument("--version", action="version", version=f"loupe {sys.modules[__package__].__version__}")
    top.set_defaults(run=lambda args: top.print_help())
    commands = top.add_subparsers(metavar="command")

    def command(run: Callable[[Arguments], None], about: str) -> argparse.ArgumentParser:
        """A new command, named as the function that it runs; the first line of `about` stands in the list."""
        p = commands.add_parser(run.__name__, help=about.split("\n")[0], description=about, formatter_class=_Help)
        p.set_defaults(run=run)
        return p

    p = command(train, TRAINING)
    add_training(p)
    add_magnify(p, "also show photographs cut to where the model points, and with that covered")

    p = command(evaluate, "Accuracy, what it is worth, loss and mean of the mask on one split.")
    p.set_defaults(then=[])
    add_data(p)
    add_checkpoint(p)
    p.add_argument("--batch-size", type=int, default=16, help="as in training; a step here takes four times as many")
    p.add_argument("--precision", default="no", help="no: fp32, as in `loupe audit`; bf16, fp16 or auto: faster on "
                   "some devices, and a few answers may differ")
    p.add_argument("--whole", action="store_true", help="show the whole photograph, within borders of the mean "
                   "colour, in place of a crop of its centre")
    p.add_argument("--card", action="store_true", help="write the accuracy into the checkpoint's model card as well")
    add_magnify(p, "look a second time, at the part that the first look points at, in full resolution")

    p = command(export, "Write an ONNX file with logits and mask as outputs.")
    add_checkpoint(p)
    p.add_argument("--out", "--output", type=Path, default=Path("loupe.onnx"), help="file to write")
    add_magnify(p, "also say in the file how a second look is taken; by mask or centre")

    for point in entry_points(group="loupe.commands"):
        point.load()(command, commands.choices)
    return top


def main(argv: list[str] | None = None) -> int:
    """What the command `loupe` runs; returns the exit code, see `exit_code`."""
    def run() -> None:
        args = parser().parse_args(argv)
        args.run(args)

    return exit_code(run)
