"""Real photographs: needs LOUPE_CUB_ROOT, a folder in CUB-200-2011's layout with at least its first ten species."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from loupe_core import CUB200, LoupeModel, Recipe, Trainer, mask_to_original, transforms_for
from loupe_core.cli import main

runs = pytest.importorskip("runs")
pytestmark = pytest.mark.skipif("LOUPE_CUB_ROOT" not in os.environ, reason="LOUPE_CUB_ROOT is not set")


@pytest.fixture(scope="module")
def albatrosses():
    """Three species, split as in CUB, the backbone with its real weights frozen but for two short epochs."""
    root = os.environ["LOUPE_CUB_ROOT"]
    names = CUB200(root).class_names[:3]
    torch.manual_seed(0)
    model = LoupeModel(runs.lite0(), num_classes=3, class_names=names, form="residual")
    recipe = Recipe(optimizer="adamw", lr=1e-3, backbone_lr_factor=0.1, epochs=3, batch_size=16, augment="crop",
                    crop_min=0.4)
    train, val, test = (CUB200(root, split, classes=names, transform=transforms_for(model.data_config, **options))
                        for split, options in (("train", recipe.train_transform_options()),
                                               ("val", dict(train=False)), ("test", dict(train=False))))
    trainer = Trainer(model, recipe, progress=False)
    trainer.fit(train, val)
    return trainer, test


def test_the_gate_trains_on_real_photographs_with_real_weights(albatrosses):
    trainer, test = albatrosses
    result = trainer.evaluate(test)
    chance = np.bincount(result.labels).max() / len(result.labels)
    assert result.accuracy > chance + 0.2
    assert 0 < result.mask_mean < 1


def test_the_mask_returns_to_the_photographs_own_pixels(albatrosses):
    trainer, test = albatrosses
    sample = test[0]
    with torch.no_grad():
        _, mask = trainer.model.eval()(sample.image[None], return_mask=True)
    assert mask.shape == (1, 1, 28, 28)
    heatmap = mask_to_original(mask[0, 0], sample.geometry)
    assert heatmap.shape == test.image(0).size[::-1]
    x, y, w, h = sample.box
    assert 0 <= x and x + w <= heatmap.shape[1] + 1 and 0 <= y and y + h <= heatmap.shape[0] + 1


def test_explain_draws_over_a_real_photograph(albatrosses, tmp_path, capsys):
    trainer, test = albatrosses
    trainer.model.save_pretrained(tmp_path / "model")
    photograph = shutil.copy(test.paths[0], tmp_path / "photo.jpg")
    out = tmp_path / "out.png"
    assert main(["explain", str(photograph), "--checkpoint", str(tmp_path / "model"), "--output", str(out)]) == 0
    (w, h), size = test.image(0).size, Image.open(out).size
    assert size[0] == w and size[1] > h  # below it, the colour bar
    assert "Albatross" in capsys.readouterr().out
