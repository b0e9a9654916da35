"""Whole or as it was before: files and folders, whatever happens while they are written."""

import pytest

from loupe_core.files.atomic import remove, replaced, write_whole


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "file", "folder"])
def test_a_file_or_folder_takes_its_place_when_the_block_ends(tmp_path, before):
    target = tmp_path / "made.txt"
    if before == "file":
        target.write_text("old")
    if before == "folder":
        target.mkdir()
        (target / "old").write_text("old")
    with replaced(target) as beside:
        assert beside.suffix == ".txt"  # what writes by the ending of a name finds it
        beside.mkdir()
        (beside / "new").write_text("new")
        assert target.exists() == (before is not None)
    assert names(tmp_path) == ["made.txt"] and names(target) == ["new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_and_nothing_else(tmp_path, error):
    target = tmp_path / "made"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(error), replaced(target) as beside:
        beside.mkdir()
        (beside / "half").write_text("half")
        raise error
    assert names(tmp_path) == ["made"] and names(target) == ["old"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    left = tmp_path / "unfinished-log"
    left.mkdir()
    (left / "half").write_text("half")
    write_whole(tmp_path / "log", "ä\n")
    assert names(tmp_path) == ["log"] and (tmp_path / "log").read_bytes() == "ä\n".encode()


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file", "none"):
        remove(tmp_path / name)
    assert names(tmp_path) == []


def test_a_removal_that_was_killed_is_finished_by_the_next_one(tmp_path, monkeypatch):
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "model").write_bytes(b"123")

    def killed(*args, **options):
        if tmp_path / ".removed-states" in args and (tmp_path / ".removed-states").is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        remove(tmp_path / "states")
    assert names(tmp_path) == [".removed-states"]
    remove(tmp_path / "states")
    assert names(tmp_path) == []
