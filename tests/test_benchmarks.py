"""The benchmarks run, in their least form, and say where their figures come from; the page takes them in."""

import json

import bench_page
import numpy as np
import pytest
import torch
from helpers import ran_here

from benchmarks import explanations, gate, growth, launches, training
from loupe_core import CUB200
from loupe_lab.birds.fieldguide import fieldguide_set, species_of


def test_the_gate_costs_few_parameters_and_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "peak_memory", ran_here)
    rows = {row["what"]: row for row in gate.main(["--quick"], folder=tmp_path)["rows"]}
    assert rows["parameters"]["gated"] - rows["parameters"]["bare"] == 9 * 192 * 12 + 12 + 12 + 1  # C = 192, C/16 = 12
    assert 1 < rows["FLOPs an image"]["ratio"] < 1.01
    assert all(row["bare"] > 0 and row["gated"] > 0 for row in rows.values())
    kept = json.loads((tmp_path / "bench_gate.json").read_text())
    assert kept["rows"][0]["what"] == "training step, s" and kept["provenance"]["processor"]


def test_launches_are_counted_before_and_now_and_on_a_real_step(tmp_path, monkeypatch):
    table = launches.main(["--quick"], folder=tmp_path)
    before, now = (next(row for row in table["steps"] if row["step"] == step) for step in ("before", "now"))
    assert before["optimizer"] > 40 * now["optimizer"] and before["waits"] == 3 and now["waits"] == 1 / 25
    assert all(before[phase] == now[phase] for phase in ("forward", "backward"))
    check, = table["check"]
    assert check["fake"] == check["real"] > 400 and check["waits"] == 0
    assert [row["runs"] for row in table["sums"]] == [24, 24, 24]
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    page = bench_page.fill("<!-- bench: launches -->\n<!-- /bench -->\n<!-- bench: hours -->\n<!-- /bench -->\n")
    assert f"| before | {before['forward']} | {before['backward']} | {before['optimizer']} |" in page
    assert "**not run here**. Assumed: 10 microseconds" in page and page.count("| T4 |") == 6


def test_passes_of_explanations_are_counted(tmp_path):
    rows = {row["method"]: row for row in explanations.main(["--quick"], folder=tmp_path)["rows"]}
    assert [rows[name]["passes"] for name in ("mask", "grad_cam", "integrated_gradients")] == [1, 1, 50]
    assert rows["occlusion"]["passes"] > 100 and rows["mask"]["ratio"] == 1


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # as the two
    threads = torch.get_num_threads()
    two, = growth.by_processes(tmp_path, 160, (2,))
    growth.train(next(tmp_path.glob("fieldguide-*/")), tmp_path / "one.json", 32, 1)
    torch.set_num_threads(threads)
    one = {f"loss, epoch {row['epoch']}": row["loss"] for row in json.loads((tmp_path / "one.json").read_text())}
    assert two["processes"] == 2
    for epoch in ("loss, epoch 1", "loss, epoch 2"):
        assert one[epoch] == pytest.approx(two[epoch], rel=1e-5)
    assert one["loss, epoch 2"] < one["loss, epoch 1"]


def test_more_images_are_listed_and_found(tmp_path):
    base = fieldguide_set(tmp_path, species_of(1), train=3, test=1, size=32)
    root = growth.repeated(base, tmp_path / "three", 3)
    assert len(CUB200(root, "train", val_fraction=0)) == 3 * 4 * 3
    assert np.array_equal(*(CUB200(root, "test").image(i) for i in (0, 4)))  # the first bird and its copy


@pytest.mark.parametrize("who", training.FOUR)
def test_each_rival_trains_the_same_model(who, tmp_path):
    pytest.importorskip({"lightning": "lightning", "hugging_face": "transformers"}.get(who, "torch"))
    root = fieldguide_set(tmp_path, species_of(5), train=4, test=1, size=112)
    epoch = training.Epoch("swin_micro", root, 2)
    before = epoch.model.backbone.head.fc.weight.detach().clone()
    getattr(epoch, who)()
    assert len(epoch.marks) == 2 and epoch.seconds > 0
    change = (epoch.model.backbone.head.fc.weight.detach().cpu() - before).abs().max()
    assert 1e-6 < change < 3e-5  # Lion: two steps of at most 1e-5, and the decay


def test_the_page_is_filled_from_the_files_and_says_what_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_page, "RESULTS", tmp_path)
    page = "a\n<!-- bench: gate -->\nold\n<!-- /bench -->\nb\n<!-- bench: cards -->\n<!-- /bench -->\n"
    assert bench_page.fill(page).count("*not measured yet: `make bench`*") == 2 and "old" not in bench_page.fill(page)
    rows = [dict(what="parameters", bare=100, gated=10**8, ratio=1.0, least=1.0, largest=1.0),
            dict(what="FLOPs an image", bare=1, gated=3 * 10**10, ratio=1.0, least=1.0, largest=1.0)]
    (tmp_path / "bench_gate.json").write_text(json.dumps(dict(rows=rows)))
    assert bench_page.fill(page).count("*not measured yet: `make bench`*") == 1
    hours = [dict(card="H100", arm=arm, host_ms=7.0, device_ms=ms) for arm, ms in (("bare", 1.0), ("loupe", 8.0))]
    (tmp_path / "bench_launches.json").write_text(json.dumps(dict(hours=hours)))
    filled = bench_page.fill(page)
    assert "| parameters | 100 | 100,000,000 | +0.000 % | +0.000 % to +0.000 % |" in filled
    assert f"| 8 (NVLink, one node) | 8 | {4e8 * 2 * 7 / 8 / 450e9 * 1000:.4g} |" in filled  # the slower of 7 and 8 ms
    # 4 bytes x 1e8 x 2 x 7/8 over 450 GB/s
    assert f"{4e8 * 2 * 7 / 8 / 450e9 * 1000:.4g}" in filled and "400 MB" in filled
