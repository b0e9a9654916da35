"""Training the Loupe end to end: `Trainer` carries out a `Recipe`, keeps what it made, and evaluates.

One deliberate change from the authors' code: early stopping and the choice of the best epoch look at a validation split
cut from train. The authors' code looks at the test split.

Devices, mixed precision, several processes and the saved state are Hugging Face Accelerate's.
"""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # not tqdm.auto: its widget is dead on a published page

from loupe_core.errors import LoupeError
from loupe_core.files.run_folder import Progress, RunFolder, check_processes, other_machine
from loupe_core.files.signals import Stopped, on_signals
from loupe_core.loss import LossTerms, LoupeLoss, per_image
from loupe_core.model import LoupeModel
from loupe_core.recipe import Recipe
from loupe_core.samples import AsSamples, check_labels, collate, identities_of, labels_of
from loupe_core.start.batches import training_batches, workers_for
from loupe_core.start.labels import class_weights_of, mixture_of
from loupe_core.start.machine import accelerator_of
from loupe_core.start.on_card import compiled, in_bytes, is_convolutional, lay_out, to_floats
from loupe_core.start.optimizers import optimizer_of, parts_of, schedule_after, schedule_of
from loupe_core.start.probe import fit_probe
from loupe_core.start.steps import Step, Tally, advance


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
        save_every: Keep a state after so many epochs, and after the last: a stopped run repeats those since. For a disk
            that is slow, or that keeps what was removed.

    Raises:
        LoupeError: The tracker is not installed; or several processes were started that Accelerate does not join.
    """

    def __init__(self, model: LoupeModel, recipe: Recipe | None = None, out_dir: str | Path | None = None,
                 progress: bool = True, tracker: str | None = None, save_every: int = 1) -> None:
        if save_every < 1:
            raise LoupeError(f"trainer: save_every={save_every}; expected 1 or more")
        self.model, self.recipe, self.progress, self.save_every = model, recipe or Recipe(), progress, save_every
        self.out_dir = Path(out_dir) if out_dir else None
        self._now = Progress()
        self.accelerator = accelerator_of(self.recipe, self.out_dir, tracker)
        self._on_card = self.accelerator.device.type == "cuda"  # of NVIDIA or AMD
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
                the best epoch. A training set's `begin_epoch(epoch)`, where it has one, is called before each epoch.
            resume: Go on after the last complete epoch found in `out_dir`, or start where there is none.
            overwrite: Begin in the place of an earlier run in `out_dir`; without it such a folder is refused.
            on_epoch_end: Called with every epoch's row once the epoch is kept; True ends the training.

        Raises:
            LoupeError: A set is empty, without labels, or has labels that the model has no class for; the loss is not
                finite (the states of earlier epochs are kept); `out_dir` holds a run; or `resume` with another recipe,
                model or images than those it was begun with, or a state that cannot be read.
            Stopped: Ctrl-C or SIGTERM; a state that is just being written is finished first.
        """
        set_seed(self.recipe.seed)
        check_labels(self.model.num_classes, train, *[] if val is None else [val])
        try:
            self._fit(train, val, resume, overwrite, on_epoch_end)
        finally:  # with optimizer and loaders, which are no longer named, what they held on the device
            self.model.zero_grad()
            self.accelerator.free_memory()
        if self._now.best_weights is not None:
            self.model.load_state_dict(self._now.best_weights)
        if self.folder and self.accelerator.is_main_process and not (self.out_dir / "best").exists():
            # the process before this one was killed while the new best was taking the old one's place
            self.folder.keep_best(self.model)
        return self.history

    def _fit(self, train, val, resume, overwrite, on_epoch_end) -> None:
        r = self.recipe
        self.model.to(self.accelerator.device)
        frozen = [p for p in parts_of(self.model)[0] if p.requires_grad] if r.backbone_lr_factor == 0 else []
        weights = class_weights_of(r, labels_of(train), self.model.num_classes)
        self.loss.class_weights = None if weights is None else weights.to(self.accelerator.device)
        lay_out(self.model, self._on_card and is_convolutional(self.model))
        average = ModelEmaV3(self.model, r.ema) if r.ema else None
        model = self.model
        try:
            for p in frozen:
                p.requires_grad_(False)
            loader = self.loader(self._bytes(train), train=True)
            model, optimizer, train_loader = self.accelerator.prepare(self.model, self.optimizer(), loader)
            val_loader = None if val is None else self.accelerator.prepare(self.loader(self._bytes(val)))
            steps, shown = len(train_loader), self.progress and self.accelerator.is_local_main_process
            run = dict(model=self.model.config, cut=getattr(train, "cut", {}), shown=getattr(train, "shown", {}),
                       train=identities_of(train), val=[] if val is None else identities_of(val))
            schedule = self._begin(optimizer.optimizer, -(-steps // r.accumulate), run, average, resume, overwrite)
            self.accelerator.init_trackers("loupe", config=dataclasses.asdict(r))
            bar = tqdm(total=r.epochs * steps, initial=len(self.history) * steps, desc="training", disable=not shown)
            with bar, on_signals(self._stop):
                if r.head == "probe" and not self.history:
                    self._probe(train, val, val_loader, model, average, bar)
                for epoch in range(len(self.history), r.epochs):
                    if self._now.stale >= r.patience:
                        break
                    if hasattr(train, "begin_epoch"):  # a set that changes with the model, such as `Magnified`
                        train.begin_epoch(epoch)
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
            lay_out(self.model, False)
            for p in frozen:
                p.requires_grad_(True)
            for tracker in getattr(self.accelerator, "trackers", []):
                tracker.finish()  # not end_training, which would also end the group of processes

    def _stop(self, number: int, frame) -> None:
        raise Stopped(f"training: stopped by {signal.Signals(number).name} after {len(self.history)} epochs"
                      f"{self.folder.kept() if self.folder else ''}", number)

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
        self._now.compare(row, self.model, self.recipe)
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
        states = self.folder.states() if self.folder else []
        kept = f"; the states up to epoch {int(states[-1].name[6:])} are kept in {self.out_dir}" if states else ""
        began, tally = time.perf_counter(), Tally(self.accelerator.device, epoch, kept)
        take = Step(self.accelerator, self.model, model, compiled(model, r.compile), self.loss, optimizer, r,
                    parts_of(self.model)[0] if alone else [])
        for step, batch in enumerate(loader):
            images, labels = mix(to_floats(batch["image"], self.model), batch["label"])
            tally.add(*take(images, labels, epoch + step / len(loader), tally), batch["label"])
            if self.accelerator.sync_gradients and not optimizer.step_was_skipped:  # as fp16 does where it overflows
                schedule.step()
                if average:
                    average.update(self.model)
            advance(bar, r.epochs, tally.flush)
        tally.flush()
        sums, right, count = tally.sums, tally.right, tally.count
        if self.accelerator.num_processes > 1:  # each process saw its own part of the images
            total = torch.tensor([*sums, count, right], device=self.accelerator.device)
            *sums, count, right = self.accelerator.reduce(total, "sum").tolist()
        loss, classification, sparsity, mask_mean = (s / count for s in sums)
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
            out, masks = model(to_floats(batch["image"], self.model), return_mask=True)
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
        # not the accelerator's own method, which would hold the loader until the next training
        loader = prepare_data_loader(self.loader(self._bytes(data)), self.accelerator.device, put_on_device=True)
        with self.accelerator.autocast():
            terms, mask_mean, logits, labels, ids = self._run(self.model, loader)
        probabilities = logits.softmax(1).numpy()
        predictions = probabilities.argmax(1)
        return Evaluation(float((predictions == labels.numpy()).mean()), terms.total.item(), mask_mean, probabilities,
                          predictions, labels.numpy(), ids.numpy())

    # --- what another training may replace ---------------------------------------------------------------------

    def before_keeping(self, row: dict) -> None:
        """Called with every epoch's row before the epoch is kept (`on_epoch_end`: after); here it does nothing."""

    def _bytes(self, data: Dataset) -> Dataset:
        return in_bytes(data, self.model) if self._on_card else data

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer, see `optimizer_of`."""
        return optimizer_of(self.model, self.recipe)

    def loader(self, dataset: Dataset, train: bool = False) -> DataLoader:
        """Batches of a data set, see `collate`: shuffled for training; else in order, four times as large."""
        r, images = self.recipe, (1 if train else 4) * self.recipe.batch_size
        samples, processes = AsSamples(dataset), self.accelerator.num_processes
        batches = training_batches(self.model, samples, r, processes) if train else dict(batch_size=images)
        workers = workers_for(self.model, samples, r, images, self._on_card, self.accelerator.print)
        # No persistent workers: their random numbers would go on from epoch to epoch, where no state keeps them.
        return DataLoader(samples, **batches, **workers, collate_fn=collate, pin_memory=self._on_card)

    # --- what is set up and what is kept -----------------------------------------------------------------------

    def _begin(self, optimizer: torch.optim.Optimizer, steps: int, run: dict, average: ModelEmaV3 | None, resume: bool,
               overwrite: bool) -> LRScheduler:
        """Where to start: at the beginning, or after the newest state in `out_dir`; `steps` are of one epoch."""
        schedule, self._now = schedule_of(optimizer, self.recipe, steps), Progress()
        self._begun = dict(steps=steps, precision=self.accelerator.mixed_precision)
        if self.folder is None:
            return schedule
        if not (resume and self.folder.states()):
            self.folder.begin(dataclasses.asdict(self.recipe), run, overwrite or resume)
            return schedule
        self.folder.check(run, Recipe.read(self.out_dir / "recipe.json"), self.recipe)
        own = self.folder.load()
        try:
            before, kept = own.pop("begun", self._begun), own.pop("schedule")
            if before["steps"] == steps:
                schedule.load_state_dict(kept)
            else:
                schedule = schedule_after(optimizer, self.recipe, steps, len(own["history"]))
            if average:
                average.load_state_dict(own.pop("average"))
            self._now = Progress(**own)
        except (KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise self.folder.unreadable(e) from e
        if before != self._begun and self.accelerator.is_main_process:
            print(f"resume: {other_machine(before, self._begun)}", file=sys.stderr)
        return schedule

    def _end_epoch(self, model, schedule: LRScheduler, average: ModelEmaV3 | None, row: dict) -> None:
        now, r, plain = self._now, self.recipe, self.accelerator.unwrap_model(model)
        self.before_keeping(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["epoch"])
        better = now.add(row, plain, r)
        if self.folder is None:
            return
        whole = row["epoch"] % self.save_every == 0 or row["epoch"] == r.epochs or now.stale >= r.patience
        stop, own = [], dict(schedule=schedule.state_dict(), begun=self._begun, **vars(now))
        own |= dict(average=average.state_dict()) if average else {}
        with on_signals(lambda *caught: stop.append(caught)):  # they wait until all is written
            self.folder.keep(plain, own, row["epoch"], better, whole)
        if stop:
            self._stop(*stop[0])
