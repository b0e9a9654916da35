"""Training the Loupe end to end: `Trainer` carries out a `Recipe`, keeps what it made, and evaluates.

One deliberate change from the authors' code: early stopping and the choice of the best epoch look at a validation split
cut from train. The authors' code looks at the test split.

Devices, mixed precision, several processes and the saved state are Hugging Face Accelerate's.
"""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.utils import ModelEmaV3
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # not tqdm.auto: its widget is dead on a published page

from loupe_core.errors import LoupeError
from loupe_core.files.run_folder import Progress, RunFolder, check_processes
from loupe_core.files.signals import Stopped, on_signals
from loupe_core.loss import LossTerms, LoupeLoss, mask_mean_of, per_image
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe, pick_precision
from loupe_core.samples import AsSamples, check_labels, collate, identities_of, labels_of
from loupe_core.start.batches import training_batches
from loupe_core.start.labels import class_weights_of, mixture_of
from loupe_core.start.optimizers import optimizer_of, parts_of, schedule_of
from loupe_core.start.probe import fit_probe


@dataclass
class Evaluation:
    """What one pass over a data set gives; arrays are in the data set's order.

    probabilities `(N, num_classes)`, predictions, labels and image_ids `(N,)`; mask_mean: mean of M over images and
    positions (nan without a gate); loss: mean of the total loss; accuracy: fraction of right predictions.
    """

    accuracy: float
    loss: float
    mask_mean: float
    probabilities: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    image_ids: np.ndarray


class Trainer:
    """Trains a `LoupeModel`, keeps its best and its last state, and evaluates it.

    Args:
        model: Trained in place.
        recipe: The choices; None is the paper's.
        out_dir: A `RunFolder` for the best model, states, log and recipe; None keeps all in memory. A process may be
            killed at any moment, and `resume` then ends with the same weights (on a card: with deterministic kernels).
        progress: Show a bar with the time left.
        tracker: Also send every epoch's row to "tensorboard", "wandb" or another of Accelerate's trackers.

    Raises:
        LoupeError: The tracker is not installed; or several processes were started that Accelerate does not join.
    """

    def __init__(self, model: LoupeModel, recipe: Recipe | None = None, out_dir: str | Path | None = None,
                 progress: bool = True, tracker: str | None = None) -> None:
        self.model, self.recipe, self.progress = model, recipe or Recipe(), progress
        self.out_dir = Path(out_dir) if out_dir else None
        self._now = Progress()
        # Accelerate keeps one precision per process; two trainings in a notebook may well differ in it.
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
            gradient_accumulation_steps=self.recipe.accumulate,
            project_dir=str(self.out_dir or "."),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=self.recipe.seed),
        )
        check_processes(self.accelerator)
        self.folder = RunFolder(self.out_dir, self.accelerator) if self.out_dir else None
        self.loss = LoupeLoss(self.recipe.lam, self.recipe.norm, self.recipe.norm_reduction, self.recipe.warmup_epochs,
                              self.recipe.label_smoothing)

    @property
    def history(self) -> list[dict]:
        """The rows of the last `fit`, one per epoch."""
        return self._now.history

    @property
    def start(self) -> dict | None:
        """The linear probe's row in the last `fit`, of epoch 0; None where it had none, or no validation split."""
        return self._now.start

    @property
    def best(self) -> dict | None:
        """The best row of the last `fit`; that of epoch 0 where no epoch was better than the linear probe."""
        return self._now.best

    # --- fit ---------------------------------------------------------------------------------------------------

    def fit(self, train: Dataset, val: Dataset | None = None, resume: bool = False, overwrite: bool = False,
            on_epoch_end: Callable[[dict], bool | None] | None = None) -> list[dict]:
        """Trains; returns one row per epoch: loss and its terms, accuracy, mean of M, on train and validation.

        Ends with the weights of the best epoch in `model`: of lowest validation loss, or as `recipe.choose` says.

        Args:
            train, val: Data sets of `Sample` (`CUB200`, `PhotoFolder`) or of (tensor, label), as torchvision has them;
                also a Subset or ConcatDataset of them. Without `val` there is neither early stopping nor a choice of
                the best epoch.
            resume: Go on after the last complete epoch found in `out_dir`, or start where there is none.
            overwrite: Begin in the place of an earlier run in `out_dir`; without it such a folder is refused.
            on_epoch_end: Called with every epoch's row once the epoch is kept; True ends the training.

        Raises:
            LoupeError: A set is empty, without labels, or has labels that the model has no class for; the loss is not
                finite (the states of earlier epochs are kept); `out_dir` holds a run; or `resume` with another recipe,
                model or images than those it was begun with, or a state that cannot be read.
            Stopped: Ctrl-C or SIGTERM; a state that is just being written is finished first.
        """
        r = self.recipe
        set_seed(r.seed)
        check_labels(self.model.num_classes, train, *[] if val is None else [val])
        self.model.to(self.accelerator.device)
        frozen = [p for p in parts_of(self.model)[0] if p.requires_grad] if r.backbone_lr_factor == 0 else []
        self.loss.class_weights = class_weights_of(r, labels_of(train), self.model.num_classes)
        average = ModelEmaV3(self.model, r.ema) if r.ema else None
        model = self.model
        try:
            for p in frozen:
                p.requires_grad_(False)
            loader = self.loader(train, train=True)
            model, optimizer, train_loader = self.accelerator.prepare(self.model, self.optimizer(), loader)
            val_loader = None if val is None else self.accelerator.prepare(self.loader(val))
            steps, shown = len(train_loader), self.progress and self.accelerator.is_local_main_process
            schedule = schedule_of(optimizer.optimizer, r, -(-steps // r.accumulate))
            run = dict(model=self.model.config, cut=getattr(train, "cut", {}), train=identities_of(train),
                       val=[] if val is None else identities_of(val))
            self._now = self._begin(schedule, run, average, resume, overwrite)
            self.accelerator.init_trackers("loupe", config=dataclasses.asdict(r))
            bar = tqdm(total=r.epochs * steps, initial=len(self.history) * steps, desc="training", disable=not shown)
            with bar, on_signals(self._stop):
                if r.head == "probe" and not self.history:
                    self._probe(train, val, val_loader, model, average, bar)
                for epoch in range(len(self.history), r.epochs):
                    if self._now.stale >= r.patience:
                        break
                    row = dict(epoch=epoch + 1, lr=optimizer.param_groups[-1]["lr"])
                    row |= self._train_epoch(epoch, model, optimizer, schedule, train_loader, average, bar)
                    tried = average.module if average else model
                    row |= self._validate(tried, val_loader)
                    self._end_epoch(tried, schedule, average, row)
                    bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "val_loss", "val_accuracy") if k in row})
                    if on_epoch_end is not None and on_epoch_end(row):
                        break
        finally:
            # prepare() wrapped the model's forward for mixed precision; give the plain model back
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("forward", None)
            for p in frozen:
                p.requires_grad_(True)
            for tracker in getattr(self.accelerator, "trackers", []):
                tracker.finish()  # not end_training, which would also end the group of processes
            self.accelerator.free_memory()
        if self._now.best_weights is not None:
            self.model.load_state_dict(self._now.best_weights)
        if self.folder and self.accelerator.is_main_process and not (self.out_dir / "best").exists():
            # the process before this one was killed while the new best was taking the old one's place
            self.folder.keep_best(self.model)
        return self.history

    def _stop(self, number: int, frame) -> None:
        done = len(self.history)
        kept = f"; {done} complete epochs are kept in {self.out_dir}: resume" if self.out_dir and done else ""
        raise Stopped(f"training: stopped by {signal.Signals(number).name} after {done} epochs{kept}", number)

    def _probe(self, train, val, val_loader, model, average, bar) -> None:
        """Makes the classifier a linear probe, on images as validation shows them; its row is the first best."""
        plain = copy(train)
        if hasattr(val, "transform") and hasattr(train, "transform"):
            plain.transform = val.transform
        fit_probe(self.model, self.loader(plain), val and self.loader(val), progress=not bar.disable)
        if average:
            average.set(self.model)
        if val_loader is None:
            return
        self._now.start = row = dict(epoch=0) | self._validate(model, val_loader)
        self._compare(row, model)
        if self.folder and self.accelerator.is_main_process:
            self.folder.keep_best(self.model)
        if not bar.disable:
            bar.write(f"linear probe on the frozen features: validation accuracy {row['val_accuracy']:.4f}, the line "
                      "to beat")

    def _train_epoch(self, epoch, model, optimizer, schedule, loader, average, bar) -> dict:
        # A seed of its own for every epoch: a resumed run then draws what an uninterrupted one would have drawn.
        # NumPy takes seeds below 2**32, and each process adds its number to it.
        most = 2**32 - self.accelerator.num_processes
        set_seed((self.recipe.seed * 100_003 + epoch) % most, device_specific=True)
        loader.set_epoch(epoch)
        model.train()
        r, alone = self.recipe, epoch < self.recipe.freeze_epochs
        mix = mixture_of(r, self.model.num_classes)
        if r.freeze_batchnorm or r.backbone_lr_factor == 0 or alone:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        began, sums, right, count = time.perf_counter(), 0.0, 0, 0
        for step, batch in enumerate(loader):
            images, labels = mix(batch["image"], batch["label"])
            with self.accelerator.accumulate(model):
                logits, masks = model(images, return_mask=True)
                terms = self.loss(logits, labels, masks, epoch=epoch + step / len(loader))
                if not torch.isfinite(terms.total):
                    kept = f"; the states up to epoch {epoch} are kept in {self.out_dir}" \
                        if self.out_dir and epoch else ""
                    raise LoupeError(f"training: the loss is {terms.total.item()} in epoch {epoch + 1}, step {step + 1}"
                                     f"; expected a finite number: lower lr, or set precision to 'no'{kept}")
                self.accelerator.backward(terms.total)
                if self.accelerator.sync_gradients:
                    for p in parts_of(self.model)[0] if alone else ():
                        p.grad = None  # what has no gradient stays, without weight decay too
                    if r.clip_grad:
                        self.accelerator.clip_grad_norm_(model.parameters(), r.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                schedule.step()
                if average:
                    average.update(self.model)
            values = torch.stack([*(t.detach().float() for t in terms), mask_mean_of(masks, logits)])
            n = len(logits)
            sums, count = sums + n * values.cpu().double(), count + n
            right += (logits.detach().argmax(1) == batch["label"]).sum().item()
            bar.update()
            if not bar.disable and bar.n == bar.initial + 1:
                self._clock = time.perf_counter()  # the first step takes longer than the others
            elif not bar.disable and bar.n == bar.initial + 11:
                minutes = (time.perf_counter() - self._clock) / 10 * (bar.total - bar.n) / 60
                bar.write(f"about {minutes:.1f} minutes more for {r.epochs} epochs, fewer where it stops early")
        if self.accelerator.num_processes > 1:  # each process saw its own part of the images
            total = torch.tensor([*sums, count, right], device=self.accelerator.device)
            *sums, count, right = self.accelerator.reduce(total, "sum").tolist()
        loss, classification, sparsity, mask_mean = (float(s) / count for s in sums)
        return dict(loss=loss, classification=classification, sparsity=sparsity, mask_mean=mask_mean,
                    accuracy=right / count, lam=self.loss.lam_at(epoch), seconds=time.perf_counter() - began)

    def _validate(self, model, loader) -> dict:
        """The columns of validation in an epoch's row; none without a split."""
        if loader is None:
            return {}
        with self.accelerator.autocast():
            terms, mask_mean, logits, labels, _ = self._run(model, loader)
        return dict(val_loss=terms.total.item(), val_mask_mean=mask_mean,
                    val_accuracy=(logits.argmax(1) == labels).double().mean().item())

    @torch.inference_mode()
    def _run(self, model, loader) -> tuple[LossTerms, float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass without gradients: the loss, the mean of M, and logits, labels, image ids in order."""
        model.eval()
        logits, labels, ids, means = [], [], [], []
        for batch in tqdm(loader, desc="evaluating", leave=False, disable=None if self.progress else True):
            out, masks = model(batch["image"], return_mask=True)
            # per image, so that a smaller last batch weighs what it should
            extra = torch.stack([per_image(masks, lambda m: m.float().mean((1, 2, 3)), out, math.nan),
                                 per_image(masks, self.loss.penalty, out, 0.0)], 1)
            gathered = self.accelerator.gather_for_metrics(
                (out.float(), batch["label"], batch["image_id"], extra))
            for store, value in zip((logits, labels, ids, means), gathered):
                store.append(value.cpu())
        logits, labels, ids, means = map(torch.cat, (logits, labels, ids, means))
        mask_mean, sparsity = means.double().mean(0)
        return self.loss.combine(logits.double(), labels, sparsity), mask_mean.item(), logits, labels, ids

    def evaluate(self, data: Dataset) -> Evaluation:
        """One pass over a data set as in `fit` (over the test split: once, at the very end).

        Raises:
            LoupeError: The set is empty, without labels, or has labels that the model has no class for.
        """
        check_labels(self.model.num_classes, data)
        self.model.to(self.accelerator.device)
        loader = self.accelerator.prepare(self.loader(data))
        with self.accelerator.autocast():
            terms, mask_mean, logits, labels, ids = self._run(self.model, loader)
        probabilities = logits.softmax(1).numpy()
        predictions = probabilities.argmax(1)
        return Evaluation(float((predictions == labels.numpy()).mean()), terms.total.item(), mask_mean, probabilities,
                          predictions, labels.numpy(), ids.numpy())

    # --- what another training may replace ---------------------------------------------------------------------

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer, see `optimizer_of`."""
        return optimizer_of(self.model, self.recipe)

    def loader(self, dataset: Dataset, train: bool = False) -> DataLoader:
        """Batches of a data set, see `collate`: shuffled for training; else in order, four times as large."""
        r, on_gpu = self.recipe, self.accelerator.device.type == "cuda"
        workers = r.workers if r.workers >= 0 else min(8, os.cpu_count() or 1) if on_gpu else 0
        samples, processes = AsSamples(dataset), self.accelerator.num_processes
        batches = training_batches(self.model, samples, r, processes) if train else dict(batch_size=4 * r.batch_size)
        return DataLoader(samples, **batches, collate_fn=collate, num_workers=workers, pin_memory=on_gpu,
                          persistent_workers=workers > 0)

    # --- what is set up and what is kept -----------------------------------------------------------------------

    def _begin(self, schedule: LRScheduler, run: dict, average: ModelEmaV3 | None, resume: bool,
               overwrite: bool) -> Progress:
        """Where to start: at the beginning, or after the newest state in `out_dir`."""
        if self.folder is None:
            return Progress()
        if not (resume and self.folder.states()):
            self.folder.begin(dataclasses.asdict(self.recipe), run, overwrite or resume)
            return Progress()
        self.folder.check(run, Recipe.read(self.out_dir / "recipe.json"), self.recipe)
        own = self.folder.load()
        try:
            schedule.load_state_dict(own.pop("schedule"))
            if average:
                average.load_state_dict(own.pop("average"))
            return Progress(**own)
        except (KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise self.folder.unreadable(e) from e

    def _end_epoch(self, model, schedule: LRScheduler, average: ModelEmaV3 | None, row: dict) -> None:
        now = self._now
        now.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["epoch"])
        better = self._compare(row, model)
        if self.folder is not None:
            stop, own = [], dict(schedule=schedule.state_dict(), **vars(now))
            own |= dict(average=average.state_dict()) if average else {}
            with on_signals(lambda *caught: stop.append(caught)):  # they wait until all is written
                self.folder.keep(self.accelerator.unwrap_model(model), own, row["epoch"], better)
            if stop:
                self._stop(*stop[0])

    def _compare(self, row: dict, model) -> bool:
        """Whether a row is the best so far, as all are without a validation split; then its weights are kept."""
        now, r = self._now, self.recipe
        if "val_loss" not in row:
            better = moved = True
        elif r.choose == "loss":
            better, moved = (row["val_loss"] < now.best_loss - least for least in (0, r.min_delta))
        else:
            better = moved = now.best is None or max((now.best, row), key=_accuracy) is row
        now.stale = 0 if moved else now.stale + 1
        if better:
            now.best, now.best_loss = row, row.get("val_loss", math.inf)
            if "val_loss" in row or r.ema:
                plain = self.accelerator.unwrap_model(model)
                now.best_weights = {k: v.detach().cpu().clone() for k, v in plain.state_dict().items()}
        return better


def _accuracy(row: dict) -> tuple[float, float]:
    """What is higher in a better row, where accuracy chooses: of the same accuracy, the lower loss."""
    return row["val_accuracy"], -row["val_loss"]
