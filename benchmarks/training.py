"""Images per second of the Trainer, of a plain loop, of Lightning's and of Hugging Face's Trainer.

    python -m benchmarks.training [--quick]      # needs: pip install -e '.[bench]'

The same model, birds, transform, batches and optimizer. The plain loop is the paper's recipe as it is usually written,
in fp32. The two frameworks get the precision that the Trainer picks here. An epoch of training is timed, without
set-up, validation or the first batch; the four take turns. The second table says where the Trainer's time goes. Writes
data/results/bench_training.json.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from lion_pytorch import Lion
from torch.utils.data import DataLoader

from benchmarks.common import command, interleaved, ratio
from benchmarks.memory import peak_memory
from loupe_core import CUB200, LoupeModel, Recipe, Sample, Trainer, collate, transforms_for
from loupe_core.recipe import pick_precision
from loupe_lab.birds.fieldguide import fieldguide_set, species_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {"swin_micro": ("swin_micro", 112, 32), "swin_tiny": ("swin_tiny_patch4_window7_224", 224, 16)}


def images_and_labels(samples: list[Sample]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in collate(samples).items() if name in ("image", "label")}


class Epoch:
    """One epoch of one of the four on a case; `seconds` is the time from the end of its first step to that of its last.
    """

    def __init__(self, case: str, root: Path, steps: int) -> None:
        name, size, batch = CASES[case]
        torch.manual_seed(0)
        self.model = LoupeModel(name, num_classes=20, pretrained=False)
        self.recipe = Recipe.small(epochs=1, batch_size=batch, lr=1e-5, workers=0)
        transform = transforms_for(self.model.data_config, **self.recipe.train_transform_options())
        self.birds = CUB200(root, "train", val_fraction=0, transform=transform, cache=True)
        self.birds = torch.utils.data.Subset(self.birds, range(batch * steps))
        self.batch, self.images, self.marks = batch, batch * (steps - 1), []

    def mark(self, *_: object, **__: object) -> None:
        """To be called at the end of each step."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.marks[-1] - self.marks[0]

    def loader(self) -> DataLoader:
        return DataLoader(self.birds, self.batch, shuffle=True, collate_fn=images_and_labels)

    def optimizer(self) -> Lion:
        return Lion(self.model.parameters(), lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)

    def loss(self, batch: dict) -> torch.Tensor:
        logits, mask = self.model(batch["image"], return_mask=True)
        return torch.nn.functional.cross_entropy(logits, batch["label"]) + 0.05 * mask.abs().mean()

    # --- the four ----------------------------------------------------------------------------------------------

    def trainer(self) -> None:
        """This package's."""
        trainer = Trainer(self.model, self.recipe, progress=False)
        real = trainer.optimizer

        def optimizer():
            made = real()
            made.register_step_post_hook(self.mark)
            return made

        trainer.optimizer = optimizer
        trainer.fit(self.birds)

    def plain(self) -> None:
        """The paper's recipe as it is usually written: fp32, one `.item()` per step for the bar."""
        self.model.to(DEVICE).train()
        optimizer = self.optimizer()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1)
        for batch in self.loader():
            batch = {name: value.to(DEVICE) for name, value in batch.items()}
            optimizer.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            optimizer.step()
            loss.item()
            self.mark()
        schedule.step()

    def lightning(self) -> None:
        import lightning

        case = self

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = case.model

            def training_step(self, batch, index):
                return case.loss(batch)

            def configure_optimizers(self):
                return case.optimizer()

            on_train_batch_end = case.mark

        with quiet():
            lightning.Trainer(max_epochs=1, precision={"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(precision(), 32),
                              accelerator=DEVICE if DEVICE == "cpu" else "gpu", devices=1, logger=False,
                              enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                              ).fit(Module(), self.loader())

    def hugging_face(self) -> None:
        import transformers

        case = self

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = case.model

            def forward(self, image, label):
                return dict(loss=case.loss(dict(image=image, label=label)))

        class Mark(transformers.TrainerCallback):
            on_step_end = case.mark

        with tempfile.TemporaryDirectory() as folder, quiet():
            arguments = transformers.TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=self.batch, use_cpu=DEVICE == "cpu",
                bf16=precision() == "bf16", fp16=precision() == "fp16", report_to=[], save_strategy="no",
                logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0,
                dataloader_pin_memory=DEVICE == "cuda")
            transformers.Trainer(
                Model(), arguments, train_dataset=self.birds, callbacks=[Mark()],
                optimizers=(self.optimizer(), None),
                data_collator=images_and_labels).train()


FOUR = ("trainer", "plain", "lightning", "hugging_face")


def precision() -> str:
    return pick_precision(torch.device(DEVICE))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def run(case: str, root: Path, steps: int, name: str) -> float:
    epoch = Epoch(case, root, steps)
    getattr(epoch, name)()
    return epoch.seconds


def turns(case: str, root: Path, steps: int, rounds: int) -> dict[str, list[float]]:
    times = {name: [] for name in FOUR}
    interleaved({name: lambda name=name: times[name].append(run(case, root, steps, name)) for name in FOUR}, rounds)
    return times


def shares(case: str, root: Path, steps: int) -> dict[str, float]:
    """Where the Trainer's time goes: fractions for data, forward, backward, optimizer and the rest."""
    epoch, spent, since = Epoch(case, root, steps), dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0), {}

    def add(name):
        if epoch.marks:  # after the first step
            spent[name] += time.perf_counter() - since[name]

    def timed(name, function):
        def call(*args, **kwargs):
            since[name] = time.perf_counter()
            result = function(*args, **kwargs)
            add(name)
            return result
        return call

    trainer = Trainer(epoch.model, epoch.recipe, progress=False)
    real_optimizer, real_loader = trainer.optimizer, trainer.loader

    def optimizer():
        made = real_optimizer()
        made.register_step_pre_hook(lambda *_: since.update(optimizer=time.perf_counter()))
        made.register_step_post_hook(lambda *_: add("optimizer"))
        made.register_step_post_hook(epoch.mark)
        return made

    def loader(dataset, train=False):
        made = real_loader(dataset, train)
        made.collate_fn = timed("data", made.collate_fn)
        return made

    fetch = type(epoch.birds).__getitem__
    epoch.birds.__class__ = type("Timed", (type(epoch.birds),), dict(__getitem__=timed("data", fetch)))
    trainer.optimizer, trainer.loader = optimizer, loader
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    epoch.model.register_forward_pre_hook(lambda *_: since.update(forward=time.perf_counter()))
    epoch.model.register_forward_hook(lambda *_: add("forward"))
    trainer.fit(epoch.birds)
    found = {name: seconds / epoch.seconds for name, seconds in spent.items()}
    return found | dict(rest=1 - sum(found.values()))


def measure(quick: bool) -> dict:
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case, (_, size, batch) in CASES.items() if not quick else [("swin_micro", CASES["swin_micro"])]:
            steps, rounds = (3, 1) if quick else (15, 5) if size == 112 else (6, 3)
            root = fieldguide_set(folder, species_of(5), train=-(-batch * steps // 20), test=1, size=size)
            for name in FOUR:
                run(case, root, 2, name)  # imports, allocations
            times = turns(case, root, steps, rounds)
            for name in FOUR:
                images = batch * (steps - 1)
                faster = ratio(times[name], times["trainer"])
                rows.append({"case": case, "who": name, "images/s": images / statistics.median(times[name]),
                             "trainer's speed": faster.pop("ratio"), **faster,
                             "peak MiB": round(peak_memory(run, case, root, 3, name) / 2**20)})
            parts.append(dict(case=case) | {k: round(v, 4) for k, v in shares(case, root, steps).items()})
    return dict(device=DEVICE, precision=precision(), rows=rows, shares=parts)


main = partial(command, "training", __doc__, measure)

if __name__ == "__main__":
    main()
