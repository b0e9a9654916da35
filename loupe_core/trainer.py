"""Training the Loupe end to end: ``Recipe`` holds every choice, ``Trainer`` carries it out.

``Recipe()`` is the paper's (v1, section IV): Lion with lr 1e-5 and weight decay 0.02, cosine annealing, early
stopping, cross-entropy + `0.05 |M|_1`. Where the paper is silent the values are those of the authors' code, with one
deliberate change: early stopping and the choice of the best epoch look at a validation split cut from train. The
authors' code looks at the test split.

Devices, mixed precision, several processes and the saved state are Hugging Face Accelerate's.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, set_seed
from lion_pytorch import Lion
from torch.utils.data import DataLoader
from tqdm import tqdm  # not tqdm.auto: its widget is dead on a published page

from loupe_core.datasets import collate
from loupe_core.errors import LoupeError
from loupe_core.loss import LoupeLoss
from loupe_core.sites import heads


@dataclass
class Recipe:
    """Every choice of a training run. The defaults are the paper's.

    Attributes:
        optimizer: "lion" (Chen et al. 2023; the paper) or "adamw".
        lr, lr_min: learning rate at the first step, and where the cosine ends.
        backbone_lr: factor on `lr` for the backbone's own parameters; gate, background and head keep `lr`.
        weight_decay: decoupled weight decay (the paper: 0.02; the authors' code in effect: 0).
        epochs, batch_size: at most so many epochs; images a step and process.
        patience, min_delta: stop after `patience` epochs without a validation loss lower by `min_delta`.
        lam, norm, norm_reduction, warmup_epochs, label_smoothing: see ``LoupeLoss`` (there `reduction`).
        augment: "randaugment" (the authors' code), "crop" (random resized crop and mirror) or "none".
        crop_min: smallest share of the photograph that the random crop may keep (timm's default 0.08).
        precision: "auto" (bf16 where the device computes in it, else fp16 on CUDA, else "no"), "bf16", "fp16", "no".
        freeze_batchnorm: keep the statistics that BatchNorm layers came with (a few hundred images make poor ones).
        workers: processes that read images; -1 takes up to 8 with a GPU and none on a CPU, where they would only
            compete with the training for cores.
        seed: order of images, augmentation, dropout. (Initial weights are drawn before the Trainer sees the model.)
    """

    optimizer: str = "lion"
    lr: float = 1e-5
    lr_min: float = 1e-7
    backbone_lr: float = 1.0
    weight_decay: float = 0.02
    epochs: int = 50
    batch_size: int = 16
    patience: int = 5
    min_delta: float = 1e-3
    lam: float = 0.05
    norm: str = "l1"
    norm_reduction: str = "mean"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    augment: str = "randaugment"
    crop_min: float = 0.08
    precision: str = "auto"
    freeze_batchnorm: bool = False
    workers: int = -1
    seed: int = 0

    def __post_init__(self):
        choices = dict(optimizer=("lion", "adamw"), augment=("randaugment", "crop", "none"),
                       precision=("auto", "bf16", "fp16", "no"))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise LoupeError(f"recipe: {name}={getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("lr", "epochs", "batch_size", "patience", "crop_min"):
            if not getattr(self, name) > 0:
                raise LoupeError(f"recipe: {name}={getattr(self, name)}; expected a number above 0")

    @classmethod
    def small(cls, **changes) -> "Recipe":
        """The recipe for field-guide birds on two CPU cores; `changes` replace values.

        A run here has some 200 steps, CUB's has 17,000: at 1e-5 nothing would move. The crop is gentler because the
        bird fills the drawing, and RandAugment's colour changes would repaint the marks that tell species apart.
        """
        values = dict(lr=3e-4, lr_min=1e-6, epochs=12, batch_size=32, augment="crop", crop_min=0.6)
        return cls(**(values | changes))

    @classmethod
    def read(cls, file: Path, **changes) -> "Recipe":
        """The recipe in a folder's ``recipe.json``; `changes` replace values. Raises LoupeError where it is none."""
        try:
            return cls(**(json.loads(file.read_text()) | changes))
        except (OSError, ValueError, TypeError) as e:
            raise LoupeError(f"{file}: found no recipe ({e}), expected what a training wrote: use a new folder") from e

    def train_transform_options(self) -> dict:
        """The keyword arguments for ``transforms_for(..., train=True)`` that carry out `augment`."""
        if self.augment == "none":
            return dict(train=False)
        options = dict(train=True, scale=(self.crop_min, 1.0))
        # `fast`: photographs are large, and RandAugment changes their pixels by far more than the faster resize does
        return options | dict(randaugment="rand-m9-mstd0.5", fast=True) if self.augment == "randaugment" else options


@dataclass
class Evaluation:
    """What one pass over a data set gives; arrays are in the data set's order.

    probabilities ``(N, num_classes)``, predictions, labels and image_ids ``(N,)``; mask_mean: mean of M over images
    and positions (nan without a gate); loss: mean of the total loss; accuracy: share of right predictions.
    """

    accuracy: float
    loss: float
    mask_mean: float
    probabilities: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    image_ids: np.ndarray


def pick_precision(device: torch.device) -> str:
    """bf16 where the device computes in it natively, fp16 on older CUDA cards such as the T4, otherwise "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and any(torch.cpu.get_capabilities().get(f) for f in ("avx512_bf16", "amx_bf16", "bf16")):
        return "bf16"
    return "no"


class Stopped(KeyboardInterrupt):
    """A training was asked to stop, by Ctrl-C or by a cluster's SIGTERM; `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class Trainer:
    """Trains a ``LoupeModel``, keeps its best and its last state, and evaluates it.

    Args:
        model: a ``LoupeModel``; trained in place.
        train_set, val_set: data sets of ``Sample`` with their transforms (``CUB200``, ``PhotoFolder``). Without a
            `val_set` there is neither early stopping nor a choice of the best epoch.
        recipe: the choices; None is the paper's.
        out_dir: folder for ``best/`` (``from_pretrained`` reads it), ``states/`` (the two newest complete epochs, for
            `resume`), ``log.jsonl`` and ``recipe.json``. None keeps all in memory. Every write is whole or as it was
            before: a process may be killed at any moment, and `resume` then ends with the same weights.
        progress: show a bar with the time left.
        tracker: also send every epoch's row to "tensorboard", "wandb" or another of Accelerate's trackers.

    Raises:
        LoupeError: an empty training set, labels that the model has no class for, or a tracker that is not installed.
    """

    def __init__(self, model, train_set, val_set=None, recipe: Recipe | None = None, out_dir=None,
                 progress: bool = True, tracker: str | None = None):
        self.recipe = recipe or Recipe()
        self.model, self.train_set, self.val_set, self.progress = model, train_set, val_set, progress
        self.out_dir = Path(out_dir) if out_dir else None
        self.history: list[dict] = []
        self._best_loss, self._best_weights, self._stale = math.inf, None, 0
        self._check(train_set)
        # Accelerate keeps one precision a process; two trainings in a notebook may well differ in it.
        AcceleratorState._reset_state()
        precision = self.recipe.precision
        if precision == "auto":
            precision = pick_precision(Accelerator().device)
            AcceleratorState._reset_state()
        trackers = [t.value for t in get_available_trackers()]
        if tracker is not None and tracker not in trackers:
            there = ", ".join(trackers) or "none is"
            raise LoupeError(f"tracker: found {tracker!r}, expected one that is installed: {there}")
        self.accelerator = Accelerator(
            mixed_precision=precision,
            log_with=tracker,
            project_dir=str(self.out_dir or "."),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=self.recipe.seed),
        )
        self.loss = LoupeLoss(self.recipe.lam, self.recipe.norm, self.recipe.norm_reduction, self.recipe.warmup_epochs,
                              self.recipe.label_smoothing)

    # --- fit ---------------------------------------------------------------------------------------------------

    def fit(self, resume: bool = False) -> list[dict]:
        """Trains; returns one row an epoch: loss and its terms, accuracy, mean of M, on train and validation.

        Ends with the weights of the epoch of lowest validation loss in `model`.

        Args:
            resume: go on after the last complete epoch found in `out_dir`, or start where there is none.

        Raises:
            LoupeError: the loss is not finite (the states of earlier epochs are kept); or `resume` with a recipe
                other than the one that `out_dir` was begun with, or a state that cannot be read.
            Stopped: Ctrl-C or SIGTERM; a state that is just being written is finished first.
        """
        r = self.recipe
        set_seed(r.seed)
        self.model.to(self.accelerator.device)
        optimizer = self._optimizer()
        train_loader = self._loader(self.train_set, train=True)
        model, optimizer, train_loader = self.accelerator.prepare(self.model, optimizer, train_loader)
        val_loader = self.accelerator.prepare(self._loader(self.val_set)) if self.val_set is not None else None
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer.optimizer, T_max=max(r.epochs * len(train_loader), 1), eta_min=r.lr_min)
        self._schedule = schedule
        self.history, self._best_loss, self._best_weights, self._stale = [], math.inf, None, 0
        try:
            self._begin(resume)
            self.accelerator.init_trackers("loupe", config=dataclasses.asdict(r))
            steps, shown = len(train_loader), self.progress and self.accelerator.is_local_main_process
            bar = tqdm(total=r.epochs * steps, initial=len(self.history) * steps, desc="training", disable=not shown)
            with bar, _on_signals(self._stop):
                for epoch in range(len(self.history), r.epochs):
                    if self._stale >= r.patience:
                        break
                    row = dict(epoch=epoch + 1, lr=optimizer.param_groups[-1]["lr"])
                    row |= self._train_epoch(epoch, model, optimizer, schedule, train_loader, bar)
                    if val_loader is not None:
                        terms, logits, labels, _ = self._run(model, val_loader)
                        row |= {f"val_{k}": v for k, v in terms.items()}
                        row["val_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
                    self._end_epoch(model, row)
                    bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "val_loss", "val_accuracy") if k in row})
        finally:
            # prepare() wrapped the model's forward for mixed precision; give the plain model back
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("forward", None)
            for tracker in getattr(self.accelerator, "trackers", []):
                tracker.finish()  # not end_training, which would also end the group of processes
            self.accelerator.free_memory()
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)
        if self.out_dir and self.accelerator.is_main_process and not (self.out_dir / "best").exists():
            # the process before this one was killed while the new best was taking the old one's place
            _replace_folder(self.out_dir / "best", self.model.save_pretrained)
        return self.history

    def _stop(self, number: int, frame) -> None:
        done = len(self.history)
        kept = f"; {done} complete epochs are kept in {self.out_dir}: resume" if self.out_dir and done else ""
        raise Stopped(f"training: stopped by {signal.Signals(number).name} after {done} epochs{kept}", number)

    def _train_epoch(self, epoch, model, optimizer, schedule, loader, bar) -> dict:
        # A seed of its own for every epoch: a resumed run then draws what an uninterrupted one would have drawn.
        set_seed(self.recipe.seed * 100_003 + epoch, device_specific=True)
        loader.set_epoch(epoch)
        model.train()
        if self.recipe.freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        began, sums, right, count = time.perf_counter(), 0.0, 0, 0
        for step, batch in enumerate(loader):
            logits, masks = model(batch["image"], return_mask=True)
            terms = self.loss(logits, batch["label"], masks, epoch=epoch + step / len(loader))
            if not torch.isfinite(terms.total):
                kept = f"; the states up to epoch {epoch} are kept in {self.out_dir}" if self.out_dir and epoch else ""
                raise LoupeError(f"training: the loss is {terms.total.item()} in epoch {epoch + 1}, step {step + 1}; "
                                 f"expected a finite number: lower lr, or set precision to 'no'{kept}")
            optimizer.zero_grad()
            self.accelerator.backward(terms.total)
            optimizer.step()
            schedule.step()
            values = torch.stack([*(t.detach().float() for t in terms), _mask_mean(masks, logits)])
            n = len(logits)
            sums, count = sums + n * values.cpu().double(), count + n
            right += (logits.detach().argmax(1) == batch["label"]).sum().item()
            bar.update()
        if self.accelerator.num_processes > 1:  # each process saw its own share of the images
            total = torch.tensor([*sums, count, right], device=self.accelerator.device)
            *sums, count, right = self.accelerator.reduce(total, "sum").tolist()
        loss, classification, sparsity, mask_mean = (float(s) / count for s in sums)
        return dict(loss=loss, classification=classification, sparsity=sparsity, mask_mean=mask_mean,
                    accuracy=right / count, lam=self.loss.lam_at(epoch), seconds=time.perf_counter() - began)

    @torch.inference_mode()
    def _run(self, model, loader) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass without gradients: mean loss and mean of M, and logits, labels, image ids in order."""
        model.eval()
        logits, labels, ids, means = [], [], [], []
        for batch in loader:
            out, masks = model(batch["image"], return_mask=True)
            # per image, so that a smaller last batch weighs what it should
            extra = torch.stack([_per_image(masks, lambda m: m.float().mean((1, 2, 3)), out, math.nan),
                                 _per_image(masks, self.loss.penalty, out, 0.0)], 1)
            gathered = self.accelerator.gather_for_metrics(
                (out.float(), batch["label"], batch["image_id"], extra))
            for store, value in zip((logits, labels, ids, means), gathered):
                store.append(value.cpu())
        logits, labels, ids, means = map(torch.cat, (logits, labels, ids, means))
        classification = torch.nn.functional.cross_entropy(
            logits.double(), labels, label_smoothing=self.recipe.label_smoothing).item()
        mask_mean, sparsity = means.double().mean(0).tolist()
        return dict(loss=classification + self.recipe.lam * sparsity, mask_mean=mask_mean), logits, labels, ids

    def evaluate(self, dataset) -> Evaluation:
        """One pass over `dataset` (for the test split: once, at the very end)."""
        self._check(dataset)
        self.model.to(self.accelerator.device)
        loader = self.accelerator.prepare(self._loader(dataset))
        with self.accelerator.autocast():
            terms, logits, labels, ids = self._run(self.model, loader)
        probabilities = logits.softmax(1).numpy()
        predictions = probabilities.argmax(1)
        return Evaluation(float((predictions == labels.numpy()).mean()), terms["loss"], terms["mask_mean"],
                          probabilities, predictions, labels.numpy(), ids.numpy())

    # --- what is set up and what is kept -----------------------------------------------------------------------

    def _check(self, dataset):
        if dataset is None or len(dataset) == 0:
            raise LoupeError("the data set holds no image; expected at least one: check its folder and split")
        top = int(np.max(dataset.labels))
        if top >= self.model.num_classes:
            raise LoupeError(f"the data set has label {top}, the model has classes 0..{self.model.num_classes - 1}: "
                             f"build it with num_classes={top + 1}")

    def _optimizer(self):
        r = self.recipe
        backbone, fresh = [], []
        head = {id(p) for module in heads(self.model.backbone) for p in module.parameters()}
        for name, p in self.model.named_parameters():
            (backbone if name.startswith("backbone.") and id(p) not in head else fresh).append(p)
        groups = [dict(params=backbone, lr=r.lr * r.backbone_lr), dict(params=fresh, lr=r.lr)]
        kind = Lion if r.optimizer == "lion" else torch.optim.AdamW
        return kind(groups, lr=r.lr, weight_decay=r.weight_decay)

    def _loader(self, dataset, train: bool = False) -> DataLoader:
        r, on_gpu = self.recipe, self.accelerator.device.type == "cuda"
        workers = r.workers if r.workers >= 0 else min(8, os.cpu_count() or 1) if on_gpu else 0
        return DataLoader(dataset, r.batch_size if train else 4 * r.batch_size, shuffle=train, collate_fn=collate,
                          num_workers=workers, pin_memory=on_gpu, persistent_workers=workers > 0)

    def _begin(self, resume: bool):
        if self.out_dir is None:
            return
        recipe_file, states = self.out_dir / "recipe.json", self._states()
        if resume and states:
            there = dataclasses.asdict(Recipe.read(recipe_file))
            for name, value in dataclasses.asdict(self.recipe).items():
                if name != "workers" and there[name] != value:
                    raise LoupeError(f"resume: {recipe_file} has {name}={there[name]!r}, the recipe now has "
                                     f"{value!r}; expected the same: resume with the old value or use a new folder")
            try:
                # not register_for_checkpointing, which would unpickle, and so execute, whatever lies in the folder
                own = torch.load(states[-1] / "trainer.pt", map_location="cpu", weights_only=True)
                self.accelerator.load_state(str(states[-1]))
                self._schedule.load_state_dict(own["schedule"])
                self.history, self._best_loss, self._stale = own["history"], own["best_loss"], own["stale"]
                self._best_weights = own["best_weights"]
            except Exception as e:  # whatever a reader of broken bytes may raise
                reason = "".join(c for c in " ".join(str(e).split()) if c.isprintable())[:200]
                raise LoupeError(f"{states[-1]}: this state cannot be read ({type(e).__name__}: {reason}); remove its "
                                 "folder and resume from the one before") from e
            return
        if self.accelerator.is_main_process:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            _remove(self.out_dir / "states")
            write_whole(recipe_file, json.dumps(dataclasses.asdict(self.recipe), indent=1) + "\n")

    def _states(self) -> list[Path]:
        return sorted((self.out_dir / "states").glob("epoch-*"))

    def _end_epoch(self, model, row: dict):
        self.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["epoch"])
        plain = self.accelerator.unwrap_model(model)
        better = True  # without a validation split every epoch counts as the best so far
        if "val_loss" in row:
            better = row["val_loss"] < self._best_loss
            self._stale = 0 if row["val_loss"] < self._best_loss - self.recipe.min_delta else self._stale + 1
            if better:
                self._best_loss = row["val_loss"]
                self._best_weights = {k: v.detach().cpu().clone() for k, v in plain.state_dict().items()}
        if self.out_dir is not None:
            stop = []
            try:
                with _on_signals(lambda *caught: stop.append(caught)):  # they wait until all is written
                    self._keep(plain, row["epoch"], better)
            except OSError as e:
                shutil.rmtree(self.out_dir / "unfinished-state", ignore_errors=True)
                raise LoupeError(f"{self.out_dir}: epoch {row['epoch']} could not be written ({e.strerror or e}); "
                                 "the states before it are intact: free some space and resume") from e
            if stop:
                self._stop(*stop[0])

    def _keep(self, plain, epoch: int, better: bool):
        """Writes log, best model and state; each is whole or as it was before. The two newest states stay."""
        if self.accelerator.is_main_process:
            if better:
                _replace_folder(self.out_dir / "best", plain.save_pretrained)
            write_whole(self.out_dir / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.history))
        unfinished, states = self.out_dir / "unfinished-state", self.out_dir / "states"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed while it wrote
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        if self.accelerator.is_main_process:
            # what Accelerate's state does not hold
            torch.save(dict(schedule=self._schedule.state_dict(), history=self.history, best_loss=self._best_loss,
                            stale=self._stale, best_weights=self._best_weights), unfinished / "trainer.pt")
        self.accelerator.wait_for_everyone()  # every process writes its share of the state
        if self.accelerator.is_main_process:
            states.mkdir(exist_ok=True)
            os.replace(unfinished, states / f"epoch-{epoch:04d}")
            for old in self._states()[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _per_image(masks, measure, logits, without: float) -> torch.Tensor:
    """Mean over sites of `measure` (a mask -> (B,)), or `without` where there is no gate: (B,) float."""
    values = [measure(m).float() for m in ([masks] if isinstance(masks, torch.Tensor) else masks)]
    return torch.stack(values).mean(0) if values else torch.full_like(logits[:, 0], without, dtype=torch.float)


def _mask_mean(masks, logits) -> torch.Tensor:
    """Mean over images, positions and sites: a scalar; nan where there is no gate."""
    return _per_image(masks, lambda m: m.detach().float().mean((1, 2, 3)), logits.detach(), math.nan).mean()


def write_whole(path: Path, text: str) -> None:
    """Writes the whole text or leaves the old file as it was."""
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(text)
    os.replace(beside, path)


def _replace_folder(folder: Path, fill) -> None:
    """Fills a new folder beside `folder`, then lets it take the old one's place."""
    beside = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    fill(beside)
    _remove(folder)
    os.replace(beside, folder)


def _remove(folder: Path) -> None:
    """Removes a folder, if it is there, so that at no moment half of it lies under its name."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
        shutil.rmtree(old)


@contextmanager
def _on_signals(handler):
    """Ctrl-C and SIGTERM call `handler` in this block. Python gives signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
