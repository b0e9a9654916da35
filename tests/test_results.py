"""Recorded results are found from the book's folders, belong to a declared grid, and carry their provenance."""

import csv
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import printed
import pytest
import record_results
import runs
import torch

from loupe_core import LoupeError
from loupe_lab.evidence.results import commit, compare_runs, interval, pack_right, read_results
from loupe_lab.evidence.statistics import paired_difference

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"


def test_results_are_found_from_a_folder_below_and_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "r.csv").write_text("arm,accuracy\nloupe,0.5\n")
    (tmp_path / "data" / "results" / "masks.json").write_text('[{"arm": "loupe", "mask": [[0.5]]}]')
    (tmp_path / "book" / "deep").mkdir(parents=True)
    monkeypatch.delenv("LOUPE_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path / "book" / "deep")
    assert read_results("r") == [{"arm": "loupe", "accuracy": "0.5"}]
    assert read_results("masks") == [{"arm": "loupe", "mask": [[0.5]]}]
    monkeypatch.chdir("/")
    with pytest.raises(LoupeError, match="no recorded results 'r.csv'"):
        read_results("r")
    monkeypatch.setenv("LOUPE_RESULTS", str(tmp_path / "data" / "results"))
    assert read_results("r")[0]["arm"] == "loupe"


def test_the_commit_is_told_and_whether_files_in_the_folders_have_changed(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path, ["code"]) == "none"
    for folder in ("code", "more", "pages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    git("init")
    assert commit(tmp_path, ["code"]) == "none"
    git("add", ".")
    git("commit", "-m", "first")
    short = git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "pages" / "file").write_text("2")
    assert commit(tmp_path, ["code", "more"]) == short
    (tmp_path / "more" / "new").write_text("1")
    assert commit(tmp_path, ["code", "more"]) == f"{short}-dirty" and commit(tmp_path, ["code"]) == short
    (tmp_path / "code" / "file").write_text("2")
    assert commit(tmp_path, ["code"]) == f"{short}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path, ["code"]) == "none"


def test_a_stopped_grid_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran = []

    def toy(arm, seed):
        ran.append((arm, seed))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return dict(accuracy=seed / 10), None

    choices = [dict(arm=arm, seed=seed) for seed in range(2) for arm in "ab"]
    monkeypatch.setitem(record_results.GRIDS, "toy", (toy, choices))
    monkeypatch.setattr(record_results, "provenance", lambda trainer: dict(commit="c"))
    with pytest.raises(KeyboardInterrupt):
        record_results.record("toy", tmp_path / "toy.csv")
    record_results.record("toy", tmp_path / "toy.csv")
    rows = list(csv.DictReader((tmp_path / "toy.csv").open()))
    assert [(r["arm"], int(r["seed"])) for r in rows] == [(c["arm"], c["seed"]) for c in choices]
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("a", 1), ("b", 1)]


def test_parts_of_a_grid_make_the_file_that_one_run_makes(tmp_path, monkeypatch):
    choices = [dict(arm=arm, seed=seed) for seed in range(5) for arm in "ab"]
    toy = (lambda arm, seed: (dict(accuracy=seed / 10), None), choices)
    monkeypatch.setitem(record_results.GRIDS, "toy", toy)
    monkeypatch.setattr(record_results, "provenance", lambda trainer: dict(commit="c"))
    monkeypatch.setattr(record_results.time, "perf_counter", lambda: 0.0)
    whole = record_results.record("toy", tmp_path / "one" / "toy.csv").read_text()
    shared = tmp_path / "many" / "toy.csv"
    parts = [record_results.record("toy", shared, (which, 3)) for which in (3, 1)]
    assert [len(part.read_text().splitlines()) for part in parts] == [1 + 3, 1 + 4] and not shared.exists()
    assert record_results.record("toy", shared).read_text() == whole  # it runs the third part
    assert record_results.record("toy", shared).read_text() == whole


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(record_results.argparse.ArgumentTypeError, match="expected which/of how many"):
        record_results.part(text)


@pytest.mark.parametrize("grid", record_results.GRIDS)
def test_a_recorded_grid_is_complete_and_says_where_it_comes_from(grid):
    rows = rows_of(grid)
    wanted = [{k: str(v) for k, v in choice.items()} for choice in record_results.GRIDS[grid][1]]
    found = [{k: row[k] for k in wanted[0]} for row in rows]
    for row in rows:
        assert row["commit"] and row["torch"] and row["timm"] and row["precision"] and float(row["seconds"]) > 0
    if grid in record_results.RECORDING:
        assert [choice for choice in wanted if choice in found] == found
        assert found != wanted, f"all rows of {grid} are there: take it out of RECORDING"
        pytest.skip(f"{grid} is being recorded: {len(found)} of {len(wanted)} rows are there, see RECORDING")
    assert found == wanted


def rows_of(grid: str) -> list[dict]:
    """The rows of a grid; those that are there so far, or none, where it is in RECORDING."""
    file = RESULTS / f"{grid}.csv"
    if grid in record_results.RECORDING and not file.exists():
        return []
    return list(csv.DictReader(file.open()))


# The row of a grid that is run again, where it is not the first. All share one training, the paper's gate with seed 0.
AGAIN = {"ablations": dict(arm="loupe", seed=0), "scorecard": dict(arm="loupe", seed=0), "routing": dict(kind="none"),
         "context": dict(arm="loupe", seed=0), "robustness": dict(arm="loupe", seed=0), "scales": dict(arm="loupe"),
         "questions": dict(arm="warm-up 5", seed=0)}
# One training more each, or several: a minute or more a row.
LONG = ("attention", "lambda", "sites", "small_profile", "photographs", "agreement", "solar_lite0", "robustness",
        "robustness_checks", "scorecard_photographs", "gap", "remedies", "scorecard", "routing", "context", "scales",
        "dynamics", "finetune", "cub10_lite0", "cub10_gates", "cub10_crops", "cub10_few", "cub10_vit_s",
        "other_photographs",
        "pretraining", "pretraining_probes", "pointing", "patches", "backdrops", "occlusion_sets", "questions", "flow",
        "second_look", "second_look_remedies", "second_look_crops", "second_look_others", "second_look_drawn")


def test_chapters_14_and_15_count_the_planned_runs_of_their_grids():
    """They type the counts: the grids are no part of the package."""
    files = re.findall(r"^(\w+) .* \d+ of (\d+)\b", printed.output("14_photographs", "recorded"), re.M)
    looks = re.findall(r"(second_look\w*) \d+ of (\d+)", printed.output("15_the_second_look", "recorded"))
    planned = dict(files) | dict(looks)
    assert len(planned) == 10
    assert {grid: int(count) for grid, count in planned.items()} == {
        grid: len(record_results.GRIDS[grid][1]) for grid in planned}


@pytest.fixture(scope="module")
def trained_afresh(tmp_path_factory):
    """Trainings that several grids measure are made once for this module, and not taken from an earlier day."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "KEPT", tmp_path_factory.mktemp("runs"))
        yield


@pytest.mark.parametrize("grid", record_results.GRIDS)
def test_a_row_that_is_run_again_gives_its_numbers(grid, trained_afresh, monkeypatch):
    """A training on another processor rounds otherwise and ends a little elsewhere: of 400 answers a dozen may differ.

    On the processor that recorded a row, with as many threads, the numbers are the same.
    """
    if grid in LONG and "LOUPE_RERUN" not in os.environ:
        pytest.skip("a training of its own: set LOUPE_RERUN to run it again")
    if grid.startswith("solar"):
        pytest.importorskip("elpv_dataset", reason="needs the extra solar")
    if grid == "brain_twins" and "LOUPE_PHOTOGRAPHS" not in os.environ:
        pytest.skip("set LOUPE_PHOTOGRAPHS to a folder that holds the folder brain_mri")
    function, choices, *_ = record_results.GRIDS[grid]
    wanted = AGAIN.get(grid, {})
    choice = next(c for c in choices if all(c[k] == v for k, v in wanted.items()))
    row = next((r for r in rows_of(grid) if all(r[k] == str(v) for k, v in choice.items())), None)
    if row is None and grid in record_results.RECORDING:
        pytest.skip(f"{grid} is being recorded: the row is not there yet, see RECORDING")
    if function.__module__ in ("grids_localisation", "grids_second_look") and grid != "second_look_drawn":
        # it measures a network that another grid has trained
        train, _ = record_results.GRIDS["cub10_lite0"]
        train(**{k: v for k, v in choice.items() if k not in ("map", "look")}, images="")
    threads = torch.get_num_threads()
    monkeypatch.setattr(record_results, "keep_masks", lambda *args: None)
    torch.set_num_threads(int(row["threads"]))
    try:
        again = record_results.run_row(grid, choice)
    finally:
        torch.set_num_threads(threads)
    compared = 0
    for column, value in again.items():
        if column in (*choice, "best_epoch", "setting") or "seconds" in column or not isinstance(value, (int, float)):
            continue
        recorded = float(row[column])
        assert value == pytest.approx(recorded, abs=0.03, rel=0.1, nan_ok=True), column
        compared += not np.isnan(recorded)
    assert compared


@pytest.mark.parametrize("grid, where, arm", [
    ("lambda", dict(norm="l1", lam="0.05"), "loupe"), ("lambda", dict(norm="l1", lam="5"), "lambda 5"),
    ("lambda", dict(norm="l1", lam="0"), "lambda 0"), ("sites", dict(site="stage3"), "stage3"),
    ("sites", dict(form="residual"), "residual"),
])
def test_a_training_that_two_grids_recorded_gave_both_the_same(grid, where, arm):
    recorded = list(csv.DictReader((RESULTS / f"{grid}.csv").open()))
    one = {r["seed"]: r["accuracy"] for r in recorded if all(r[k] == v for k, v in where.items())}
    there = list(csv.DictReader((RESULTS / "ablations.csv").open()))
    other = {r["seed"]: r["accuracy"] for r in there if r["arm"] == arm}
    both = one.keys() & other.keys()
    assert both and [one[s] for s in both] == [other[s] for s in both]


def test_the_small_profile_is_neither_trivial_nor_hopeless():
    rows = list(csv.DictReader((RESULTS / "ablations.csv").open()))
    usual = [r for r in rows if r["arm"] in ("loupe", "bare")]
    assert len(usual) == 10 and all(0.75 <= float(r["accuracy"]) <= 0.92 for r in usual)
    assert np.median([float(r["training_seconds"]) for r in usual]) <= 120
    untaught = list(csv.DictReader((RESULTS / "small_profile.csv").open()))
    assert all(0 < float(r["accuracy"]) < 0.3 for r in untaught)


def test_an_interval_is_students_t_and_covers_as_often_as_it_says():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and abs(half - 4.302653 / 3**0.5) < 1e-5  # t(0.975, 2 degrees of freedom) * 1 / sqrt(3)
    rng = np.random.default_rng(0)
    covered = [abs(mean) <= half for mean, half in (interval(rng.normal(size=4)) for _ in range(4000))]
    assert abs(np.mean(covered) - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_an_interval_of_accuracies_ends_where_they_end():
    found = interval([0.99, 1.0, 0.96], within=(0, 1))
    mean, half = found
    assert found.high == 1 and found.low == mean - half and mean + half > 1
    assert interval([0.99, 1.0, 0.96]).high > 1
    low = interval([0.0, 0.0, 0.02], within=(0, 1))
    assert low.low == 0 < low.high and interval([0.0, 0.0, 0.0], within=(0, 1)) == (0, 0)
    wide = interval([0.0, 1.0], within=(0, 1))
    assert (wide.low, wide.high, wide.half) == (0, 1, 0.5)


def test_an_interval_of_one_value_is_refused():
    with pytest.raises(LoupeError, match="found 1 value"):
        interval([0.9])


def test_two_arms_are_compared_over_the_seeds_that_both_have():
    rng = np.random.default_rng(0)
    answers = {arm: rng.random((3, 40)) < share for arm, share in (("a", 0.9), ("b", 0.6))}
    rows = {arm: [dict(seed=str(seed), accuracy=str(right.mean()), right=pack_right(right))
                  for seed, right in enumerate(each)] for arm, each in answers.items()}
    found = compare_runs(reversed(rows["a"]), rows["b"], 40)
    wanted = paired_difference(answers["a"], answers["b"])
    assert found[:4] == pytest.approx((100 * wanted.mean, 100 * wanted.low, 100 * wanted.high, wanted.p))
    assert (found.seeds, found.new_images) == (3, True)
    two = compare_runs(rows["a"], rows["b"][1:] + [dict(seed="7", accuracy="0")], 40)
    assert two.seeds == 2 and two.mean == pytest.approx(100 * (answers["a"][1:].mean() - answers["b"][1:].mean()))
    assert compare_runs(rows["a"], rows["b"][:1], 40) is None


def test_where_one_row_lacks_its_answers_the_seeds_alone_are_compared():
    a = [dict(seed=s, accuracy=0.9 + 0.01 * s, right="ff") for s in range(3)]
    b = [dict(seed=s, accuracy=0.8, right="ff" if s else "") for s in range(3)]
    found = compare_runs(a, b, 8)
    mean, half = interval([10, 11, 12])
    assert found[:3] == pytest.approx((mean, mean - half, mean + half)) and not found.new_images
