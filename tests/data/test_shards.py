"""Data sets in WebDataset and Parquet shards: the rows are those of the same images in a folder, and damage is one sentence."""

import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import constants
from PIL import Image
from pyarrow import parquet
from shard_cases import in_parquet, in_tars, members_of, metadata_of, png, write_tar

from l2r2_models import L2R2Error
from l2r2_models.data.shards import index_shards
from l2r2_models.data.table import read_table, rows_digest
from l2r2_models.images import load_image, load_mask, taken_at
from l2r2_models.predict.inputs import gather
from l2r2_models.scale.places import Place
from l2r2_models.scale.shards import images_of_shard
from l2r2_models.shards import layout, state_of

PACKED = {"tar": in_tars, "parquet": in_parquet}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "l2r2" / "shards"


def plain(table, split):
    return [(row.label, row.entry, load_image(row.path).tobytes()) for row in table.of_split(split).rows]


@pytest.mark.parametrize("kind", PACKED)
def test_rows_and_images_are_those_of_the_folder(dataset, tmp_path, kind):
    packed, folder = read_table(PACKED[kind](dataset, tmp_path / "packed")), read_table(dataset)
    assert set(packed.splits) == {"train", "val", "test"}
    for split in packed.splits:
        assert plain(packed, split) == plain(folder, split)
    name = {"tar": "train-00001.tar", "parquet": "data/train-00000-of-00001.parquet"}[kind]
    assert packed.of_split("train").names()[5] == f"{name}/images/train_005.png"
    assert packed.classes() == folder.classes()


@pytest.mark.parametrize("kind", PACKED)
def test_masks_and_columns_lie_beside_the_images(tmp_path, kind):
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 3:6] = 255
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "png")
    if kind == "tar":
        members = [
            ("a.cls", b"3\n"),
            ("a.png", png()),
            ("a.mask.png", stream.getvalue()),
            ("a.json", b'{"site": "x", "month": 5}'),
        ]
        write_tar(tmp_path / "d" / "0.tar", [*members, ("b.png", png()), ("b.json", b'{"label": "7", "split": "extra"}')])
    else:
        rows = {"image": [png(), png()], "file_name": ["a.png", "b.png"], "label": [3, 7], "split": [None, "extra"]}
        rows |= {"site": ["x", None], "month": [5, None], "mask": [{"bytes": stream.getvalue()}, None]}
        (tmp_path / "d").mkdir()
        parquet.write_table(pa.table(rows), tmp_path / "d" / "0.parquet")
    one, other = read_table(tmp_path / "d").rows
    assert (one.label, one.split, other.label, other.split, other.mask_file) == ("3", None, "7", "extra", None)
    assert load_mask(one.mask_file, (6, 8)).numpy().tolist() == (mask > 0).tolist()
    assert {"site": "x", "month": "5"}.items() <= dict(one.columns).items() and "site" not in dict(other.columns)


def test_labels_of_datasets_are_names_and_its_boxes_are_read(tmp_path):
    import datasets

    number, lists = datasets.Value("float32"), datasets.List
    kinds = {
        "image": datasets.Image(),
        "species": datasets.ClassLabel(names=["oak", "elm"]),
        "objects": {"bbox": lists(lists(number)), "score": lists(number)},
    }
    rows = [
        {"image": Image.new("RGB", (9, 9), (i, 9, 9)), "species": i % 2, "objects": {"bbox": [[1, 2, 3, 4]], "score": [0.5]}}
        for i in range(4)
    ]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    (tmp_path / "d" / "data").mkdir(parents=True)
    made.to_parquet(tmp_path / "d" / "data" / "train-00000-of-00001.parquet")
    table = read_table(tmp_path / "d")
    assert [row.label for row in table.rows] == ["oak", "elm", "oak", "elm"] and table.splits == ("train",)
    assert table.names()[3] == "data/train-00000-of-00001.parquet/3"
    assert table.rows[0].entry.boxes == ((1, 2, 4, 6),) and table.rows[0].entry.scores == (0.5,)
    assert [load_image(row.path).getpixel((0, 0))[0] for row in table.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "names, splits",
    [
        (("train-000.tar", "test_ood-000.tar"), ("test_ood", "train")),
        (("train.tar", "validation.tar"), ("train", "validation")),
        (("a/train-00000-of-00002-abc.tar", "a/train-00001-of-00002-abc.tar"), ("train",)),
        (("train/000.tar", "val/x/000.tar"), ("train", "val")),
        (("shard-000.tar", "shard-001.tar"), ()),
        (("000.tar", "more/001.tar"), ()),
    ],
)
def test_splits_are_named_by_files_or_folders(tmp_path, names, splits):
    for name in names:
        write_tar(tmp_path / name, [("a.png", png()), ("a.cls", b"x")])
    assert read_table(tmp_path).splits == splits


def test_a_metadata_file_may_describe_images_in_shards(tmp_path):
    write_tar(tmp_path / "s.tar", [("cam/a.png", png(1)), ("./cam/b.png", png(2))])
    (tmp_path / "metadata.csv").write_text("file_name,label\ns.tar/cam/b.png,x\ns.tar/cam/a.png,y\n")
    table = read_table(tmp_path)
    assert [(row.label, load_image(row.path).getpixel((0, 0))[0]) for row in table.rows] == [("x", 2), ("y", 1)]
    (tmp_path / "metadata.csv").write_text("file_name,label\ns.tar/cam/c.png,x\n")
    with pytest.raises(L2R2Error, match=r"lists s.tar/cam/c.png, which is not in"):
        read_table(tmp_path)


def test_names_need_not_be_utf8_and_times_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x0132] = "2026:03:04 05:06:07"
    name = os.fsdecode(b"caf\xe9.png")
    write_tar(tmp_path / "s.tar", [(name, png(7, exif=exif)), ("café.png", png(8))])
    first, second = gather([tmp_path]).paths
    assert first.name == name and [load_image(path).getpixel((0, 0))[0] for path in (first, second)] == [7, 8]
    assert taken_at(first) == 1772600767.0 and taken_at(second) is None


@pytest.mark.parametrize("left", [0, 100, 700, 8192, 9000, -1024])
def test_a_truncated_tar_is_refused_wherever_it_ends(dataset, tmp_path, left):
    whole = write_tar(tmp_path / "d" / "whole.tar", members_of(dataset, metadata_of(dataset)["train"]))
    data = whole.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512 + 1024)
    whole.write_bytes(data)
    assert len(read_table(tmp_path / "d")) == 12
    whole.write_bytes(data[:left])
    with pytest.raises(L2R2Error, match=r"whole.tar: is (damaged or truncated after|not a tar file).*copy it again") as error:
        read_table(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_broken_shards_are_one_sentence(tmp_path):
    def refuses(message, name, members=None, content=None, rows=None, **options):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        if members is not None:
            write_tar(folder / name, members)
        elif rows is not None:
            parquet.write_table(pa.table(rows), folder / name)
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(L2R2Error, match=message) as error:
            read_table(folder).classes()
        assert "\n" not in str(error.value)

    import gzip

    good = write_tar(tmp_path / "good.tar", [("a.png", png())]).read_bytes()
    named = [("a.png", png()), ("a.cls", b"x")]
    refuses(r"z.tar: is not a tar file that can be read by position.*without compression", "z.tar", content=gzip.compress(good))
    refuses(r"t.tar/a.png: is in the shard twice", "t.tar", [("a.png", png()), ("b.png", png()), ("./a.png", png())])
    refuses(r"j.tar/a.json: is in the shard twice", "j.tar", [("a.png", png()), ("a.json", b"{}"), ("a.json", b"{}")])
    refuses(r"k.tar/a.json: is not readable JSON", "k.tar", [("a.png", png()), ("a.json", b'{"label": ')])
    refuses(r"l.tar/a.json: is not a JSON object", "l.tar", [("a.png", png()), ("a.json", b"[1]")])
    refuses(r"m.tar/a.json: the label is not a single value", "m.tar", [("a.png", png()), ("a.json", b'{"label": [1]}')])
    refuses(r"the box of o.tar/a.png is not four numbers", "o.tar", [("a.png", png()), ("a.json", b'{"boxes": [3]}')])
    refuses(r"no image in its shards", "n.tar", [("a.txt", b"x")])
    refuses(r"1 of 2 images have no label, the first is u.tar/b.png", "u.tar", [*named, ("b.png", png())])
    refuses(r"2 of 2 images have no label, the first is v.parquet/0; add a `label`", "v.parquet", rows={"image": [png()] * 2})
    refuses(r"x.parquet: has no column of encoded images", "x.parquet", rows={"label": ["x"]})
    refuses(r'y.parquet: the column "label" does not have one label', "y.parquet", rows={"image": [png()], "label": [["x"]]})
    refuses(r"q.parquet: is damaged or not a Parquet file", "q.parquet", content=b"PAR1")


def test_an_image_that_cannot_be_used_is_named_with_its_shard(tmp_path):
    from l2r2_models.images import ImageError

    write_tar(tmp_path / "s.tar", [("a.png", png(size=(90, 90))[:70]), ("empty.png", b""), ("b.png", png())])
    parquet.write_table(pa.table({"image": [{"bytes": None, "path": "none.png"}]}), tmp_path / "t.parquet")
    bad, empty, good, none = (row.path for row in read_table(tmp_path).rows)
    for path, message in ((bad, "cannot be decoded"), (empty, "is empty"), (none, "has no image in this row")):
        with pytest.raises(ImageError, match=f"^{path}: {message}"):
            load_image(path)
    with pytest.raises(ImageError, match=r"s.tar/c.png: no such image in the shard"):
        load_image(tmp_path / "s.tar" / "c.png")
    assert load_image(good).size == (8, 6) and gather([good]).paths == (good,)
    with pytest.raises(L2R2Error, match=r"s.tar/c.png: no such file or folder"):
        gather([tmp_path / "s.tar" / "c.png"])


@pytest.mark.parametrize("kind", PACKED)
def test_a_shard_that_changes_is_not_read_by_an_old_index(dataset, tmp_path, kind):
    shard = sorted(PACKED[kind](dataset, tmp_path / "packed").rglob("train*"))[0]
    before = read_table(tmp_path / "packed")
    digest = rows_digest(before.of_split("train"))
    rows = metadata_of(dataset)["train"][::-1]
    if kind == "tar":
        write_tar(shard, members_of(dataset, rows))
    else:
        images = [{"bytes": (dataset / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
        parquet.write_table(pa.table({"image": images, "label": [row["label"] for row in rows]}), shard)
    first = before.of_split("train").rows[0].path
    with pytest.raises(L2R2Error, match=r"train_000.png: the shard has changed since this command first read it"):
        load_image(first)
    after = read_table(tmp_path / "packed").of_split("train")
    assert rows_digest(after) != digest
    by_name = {row.path.name: row for row in after.rows}
    assert load_image(by_name["train_000.png"].path).tobytes() == load_image(dataset / rows[-1]["file_name"]).tobytes()


def test_a_shard_is_indexed_once_and_its_files_stay_readable_by_path(dataset, tmp_path, cache):
    packed = in_tars(dataset, tmp_path / "packed")
    table = read_table(packed)
    made = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(made) == len(list(packed.iterdir())) == 9
    assert read_table(packed) == table and {file: file.stat().st_mtime_ns for file in cache.iterdir()} == made
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert read_table(packed) == table
    shutil.copytree(packed, tmp_path / "moved")  # shutil keeps modification times
    moved = read_table(tmp_path / "moved")
    assert rows_digest(moved) == rows_digest(table) and [replace(row, path=row.path.name) for row in moved.rows] == [
        replace(row, path=row.path.name) for row in table.rows
    ]


def test_shards_may_be_named_alone_or_by_a_pattern(dataset, tmp_path):
    packed = in_tars(dataset, tmp_path / "packed")
    assert read_table(packed / "val-00001.tar").names()[0] == "val-00001.tar/images/val_005.png"
    paths = gather([packed / "t*-0000[01].tar"]).paths
    assert [path.parents[1].name for path in paths[::5]] == [f"{s}-0000{i}.tar" for s in ("test", "train") for i in (0, 1)]
    with pytest.raises(L2R2Error, match="no image and no folder matches this pattern"):
        gather([packed / "x*.tar"])


def test_damage_inside_parquet_is_a_failure_of_its_images(tmp_path):
    file = tmp_path / "p.parquet"
    images = [{"bytes": png(i, (90, 90)), "path": f"{i}.png"} for i in range(20)]
    parquet.write_table(pa.table({"image": images}), file, row_group_size=10)
    rows = read_table(file).rows
    start = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    about, data = file.stat(), bytearray(file.read_bytes())
    data[start : start + 400] = bytes(400)
    file.write_bytes(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # a disk error leaves the times
    assert load_image(rows[3].path).getpixel((0, 0))[0] == 3
    with pytest.raises(L2R2Error, match=r"^\S+p.parquet/15.png: ") as error:
        load_image(rows[15].path)
    assert "\n" not in str(error.value)


def test_large_row_groups_are_warned_of_before_a_training(tmp_path, caplog):
    images = pa.table({"image": [np.random.default_rng(i).bytes(1_000_000) for i in range(20)]})
    for folder, size in (("small", 4), ("large", 20)):
        (tmp_path / folder).mkdir()
        parquet.write_table(images, tmp_path / folder / "a.parquet", row_group_size=size)
        index_shards(tmp_path / folder)
    assert caplog.messages == [
        f"{tmp_path}/large: each image is read with its row group of up to 20 MB, which slows training down; "
        "write the Parquet files with a smaller row_group_size, such as 16"
    ]


def test_a_folder_of_images_that_also_has_an_archive_is_a_folder(tmp_path):
    for label in ("x", "y"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(png())
    write_tar(tmp_path / "backup.tar", [("z.png", png())])
    assert [row.label for row in read_table(tmp_path).rows] == ["x", "y"]


def test_json_of_a_hostile_member_is_only_metadata(tmp_path):
    about = {"label": "x", "file_name": "../../etc/passwd", "split": "train"}
    write_tar(tmp_path / "test-0.tar", [("../../up.png", png()), ("../../up.json", json.dumps(about).encode())])
    (row,) = read_table(tmp_path).rows
    assert row.path == tmp_path / "test-0.tar" / "up.png" and load_image(row.path).size == (8, 6)
    assert (row.label, row.split) == ("x", "train")


def test_a_url_is_refused_with_what_to_do():
    with pytest.raises(L2R2Error, match="no such folder; data sets are read from a disk, so mount or copy it"):
        read_table("s3://bucket/data")


def header_broken(content):
    return content[:2048] + b"\xff" * 100 + content[2148:]


@pytest.mark.parametrize("damage, message", [(header_broken, "damaged"), (lambda content: content * 2, "more after its end")])
def test_a_tar_with_images_after_damage_or_its_end_is_refused_by_both_readers(tmp_path, damage, message):
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(5)])
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(L2R2Error, match=message):
        read_table(shard)
    *_, (name, why) = images_of_shard("a.tar", Place.of(shard))
    assert name == "a.tar" and "cannot be read further" in why


def test_a_single_shard_does_not_ignore_metadata(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.png", png())])
    with pytest.raises(L2R2Error, match="a metadata file describes the images of a folder"):
        read_table(shard, metadata=tmp_path / "m.csv")


def test_rows_whose_names_repeat_are_numbered_by_both_readers(tmp_path):
    images = [{"bytes": png(i), "path": "0001.png"} for i in range(3)]
    parquet.write_table(pa.table({"image": images, "label": ["x", "y", "x"]}), tmp_path / "a.parquet", row_group_size=2)
    table = read_table(tmp_path / "a.parquet")
    assert table.names() == [f"a.parquet/{i}" for i in range(3)]
    assert [load_image(row.path).getpixel((0, 0))[0] for row in table.rows] == [0, 1, 2]
    found = images_of_shard("a.parquet", Place.of(tmp_path / "a.parquet"))
    assert list(found) == [(f"a.parquet/{i}", png(i)) for i in range(3)]


def test_columns_that_datasets_cannot_read(tmp_path):
    import datasets

    file = tmp_path / "a.parquet"
    pairs = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))
    parquet.write_table(pa.table({"image": [png()], "label": ["x"], "more": pairs}), file)
    assert read_table(file).rows[0].label == "x"
    parquet.write_table(pa.table({"image": [png()]}).replace_schema_metadata({"huggingface": "{"}), file)
    with pytest.raises(L2R2Error, match=r"a.parquet: `datasets` cannot read its columns"):
        read_table(file)
    kinds = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["x", "y"])})
    parquet.write_table(pa.table({"image": [png()], "label": [5]}, kinds.arrow_schema), file)
    with pytest.raises(L2R2Error, match=r"a.parquet/0: its columns cannot be read"):
        read_table(file)


def test_a_folder_may_have_any_name_and_a_changed_parquet_has_no_state(tmp_path):
    file = tmp_path / "İzmir" / "a.parquet"
    file.parent.mkdir()
    parquet.write_table(pa.table({"image": [png(7)]}), file)
    (row,) = read_table(file).rows
    assert load_image(row.path).getpixel((0, 0))[0] == 7 and state_of(row.path) is not None
    file.write_bytes(b"PAR1")
    assert state_of(row.path) is None


def test_long_names_and_large_images_are_refused(tmp_path, monkeypatch):
    with pytest.raises(L2R2Error, match=r"has 5,000 bytes, over 4,096"):
        read_table(write_tar(tmp_path / "a.tar", [("x" * 5000, b"")]))
    parquet.write_table(pa.table({"image": [png(size=(90, 90)), png(), png()]}), tmp_path / "b.parquet")
    first, second, _ = (row.path for row in read_table(tmp_path / "b.parquet").rows)
    monkeypatch.setattr(layout, "MAX_BYTES", len(png(size=(90, 90))) - 1)
    with pytest.raises(L2R2Error, match=r"b.parquet/0: is larger than the limit"):
        load_image(first)
    assert load_image(second).size == (8, 6)
    assert ["larger" in str(data) for _, data in images_of_shard("b.parquet", Place.of(tmp_path / "b.parquet"))] == [
        True,
        False,
        False,
    ]
    monkeypatch.setattr(layout, "MAX_BYTES", 10)
    with pytest.raises(L2R2Error, match=r"is larger than the limit"):
        layout.check_row_group(parquet.ParquetFile(tmp_path / "b.parquet").metadata, 0, "image")


def test_an_index_that_cannot_be_written_is_kept_in_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HOME", "/proc/nope")
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [("a.JPG", png()), ("a.CLS", b"x"), ("a.MASK.PNG", png(mode="L"))])
    for _ in range(2):
        rows = read_table(tmp_path).rows
    assert [(row.label, row.mask_file) for row in rows] == [("x", tmp_path / n / "a.MASK.PNG") for n in ("a.tar", "b.tar")]
    assert len(caplog.messages) == 1 and "set HF_HOME to a folder that can be written" in caplog.text
