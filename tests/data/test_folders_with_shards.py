"""Which files of a folder are its data set: metadata, images, or shards."""

import pyarrow as pa
import pytest
from pyarrow import parquet
from shard_cases import png, write_tar

from l2r2_models.boxes.parquet import KEY
from l2r2_models.data.shards import index_shards, packed_in
from l2r2_models.data.table import read_table


def ours(path):
    """A file such as `l2r2 localize -o boxes.parquet` writes."""
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table({"file": ["a.png"]}).replace_schema_metadata({KEY: b"{}"}), path)


def test_boxes_and_predictions_beside_shards_are_not_shards(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.png", png()), ("a.cls", b"x")])
    ours(tmp_path / "boxes.parquet")
    ours(tmp_path / "predictions" / "part.parquet")
    index_shards(tmp_path)
    assert read_table(tmp_path).names() == ["train-0.tar/a.png"]


@pytest.mark.parametrize("folder", ["", "train"])
def test_metadata_decides_and_other_files_are_not_opened(tmp_path, folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    data = tmp_path / "data"
    (data / folder).mkdir(parents=True)
    up = "../" * len((data / folder).relative_to(tmp_path).parts)
    (data / folder / "metadata.csv").write_text(f"file_name,label\n{up}images/a.png,x\n")
    (data / "notes.parquet").write_bytes(b"not Parquet")
    index_shards(data)
    assert [row.label for row in read_table(data).rows] == ["x"] and packed_in(data) == []


def test_shards_that_an_image_hides_are_named(tmp_path, caplog):
    write_tar(tmp_path / "train-0.tar", [("a.png", png())])
    (tmp_path / "preview.png").write_bytes(png())
    assert packed_in(tmp_path) == []
    assert "its shards are not read, because preview.png lies beside them" in caplog.text


def test_hidden_files_and_folders_do_not_count(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(png())
    write_tar(tmp_path / ".old.tar", [("a.png", png())])
    shard = write_tar(tmp_path / "a.tar", [("a.png", png())])
    assert packed_in(tmp_path) == [shard]
