"""Images given as patterns, lists and standard input."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import sentence

from l2r2_models import L2R2Error
from l2r2_models.predict.inputs import gather


@pytest.fixture
def photos(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    (dataset / "images" / "deep").mkdir()
    (dataset / "images" / "test_000.png").rename(dataset / "images" / "deep" / "test_000.png")
    return dataset / "images"


def names(*sources):
    return [path.name for path in gather([*sources]).paths]


def test_patterns(photos):
    assert names(Path("data/images/test_01?.png")) == ["test_010.png", "test_011.png"]
    assert "test_000.png" in names(Path("data/**/test_*.png")) and "test_000.png" not in names(Path("data/images/test_*.png"))
    (photos / "notes.txt").write_text("not an image")
    (photos / "empty").mkdir()
    assert names(Path("data/**")) == names(Path("data/images")) and names(Path("data/im*")) == names(Path("data/images"))
    odd = photos / "a[1].png"
    (photos / "test_001.png").rename(odd)
    assert names(odd) == ["a[1].png"]  # a file of this name, not a pattern
    with pytest.raises(L2R2Error, match="no image and no folder matches this pattern"):
        gather([Path("data/images/*.tiff")])


def test_a_list_of_files_and_folders(photos, tmp_path):
    lines = [b"data/images/test_005.png", b"", b"data/images/deep\r", os.fsencode(photos / os.fsdecode(b"caf\xe9.png"))]
    (photos / os.fsdecode(b"caf\xe9.png")).write_bytes((photos / "test_002.png").read_bytes())
    (tmp_path / "list.txt").write_bytes(b"\n".join(lines))
    assert names(tmp_path / "list.txt") == ["test_005.png", "test_000.png", os.fsdecode(b"caf\xe9.png")]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(L2R2Error, match=r"empty\.txt: has no lines"):
        gather([tmp_path / "empty.txt"])
    (tmp_path / "photo.txt").write_bytes(b"\x89PNG\r\n\0\0")
    with pytest.raises(L2R2Error, match="is not a list of paths"):
        gather([tmp_path / "photo.txt"])
    (tmp_path / "list.txt").write_text("data/images/gone.png")
    with pytest.raises(L2R2Error, match=r"gone\.png: no such file"):
        gather([tmp_path / "list.txt"])


def test_a_list_on_standard_input(photos, run, tmp_path, l2r2, monkeypatch):
    def given(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    given(b"data/images/test_003.png\ndata/images/test_004.png\n")
    assert l2r2("predict", run, "-", "-o", tmp_path / "out.json").returncode == 0
    files = [image["file"] for image in json.loads((tmp_path / "out.json").read_text())["images"]]
    assert files == ["data/images/test_003.png", "data/images/test_004.png"]
    given(b"")
    assert "standard input: has no lines" in sentence(l2r2("predict", run, "-", "-o", tmp_path / "out.json"))
