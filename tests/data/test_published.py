"""`l2r2 import`: properties of every published set, on tiny folders in their documented layouts."""

import os
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from published_sets import BOX, MAKERS, image, make, object_mask

from l2r2_cli.commands import main
from l2r2_models import L2R2Error
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.published import SETS, import_published
from l2r2_models.data.table import read_table
from l2r2_models.images import FILL

EXPECTED = {  # images by split; labels; rows with a box; rows with a mask
    "waterbirds": ({"train": 2, "val": 1, "test": 1}, {"landbird", "waterbird"}, 4, 4),
    "in9": (
        {"test_original": 2, "test_mixed_same": 2, "test_mixed_rand": 2, "test_only_bg_t": 2, "train": 2, "val": 2},
        {"dog", "bird"},
        0,
        6,
    ),
    "spawrious-o2o-hard": ({"train": 16, "test": 8}, {"bulldog", "dachshund", "labrador", "corgi"}, 0, 0),
    "counteranimal": ({"test_common": 2, "test_counter": 2}, {"brambling", "ice bear"}, 0, 0),
    "metashift": ({"train": 2, "test": 2}, {"cat", "dog"}, 0, 0),
    "urbancars": ({"train": 2, "val": 2, "test": 2}, {"urban", "country"}, 0, 6),
    "hard-imagenet": ({"train": 2, "val": 2}, {"horizontal bar", "ski"}, 0, 4),
    "cub": ({"train": 2, "test": 2}, {"Black_footed_Albatross", "Indigo_Bunting"}, 4, 4),
    "iwildcam": ({"train": 2, "val": 1, "test": 1, "id_val": 1, "id_test": 1}, {"empty", "meleagris ocellata"}, 0, 0),
    "fod-a": ({"train": 4, "test_id": 2, "train_minority": 12, "test_ood": 6}, {"ClampPart", "Cutter"}, 24, 0),
    "eth80": ({"train": 4, "test": 4}, {"apple", "car"}, 0, 8),
}
GONE = {  # a file or folder without which the set is not whole
    "waterbirds": "waterbird_complete95_forest2water2/014.Indigo_Bunting/I_1.jpg",
    "in9": "bg_challenge/original",
    "spawrious-o2o-hard": "spawrious224/1/beach/corgi",
    "counteranimal": "LAION-final",
    "metashift": "MetaShift-Cat-Dog-indoor-outdoor/train/dog",
    "urbancars": "urbancars/bg-0.5_co_occur_obj-0.5/test/obj-urban_bg-urban_co_occur_obj-country/000_mask.png",
    "hard-imagenet": "hardImageNet/val",
    "cub": "CUB_200_2011/images/014.Indigo_Bunting/I_2.jpg",
    "iwildcam": "iwildcam_v2.0/train/3.jpg",
    "fod-a": "FODPascalVOCFormat-V.2.1/VOC2007/JPEGImages/000003.jpg",
    "eth80": "eth80-cropped256/car12/maps/car12-000-000-map.png",
}
every_set = pytest.mark.parametrize("name", list(MAKERS))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@every_set
def test_a_set_becomes_a_table_with_its_splits_labels_boxes_and_masks(name, tmp_path):
    folder, extra = make(name, tmp_path)
    result = import_published(name, folder, tmp_path / "out", extra=extra)
    table = read_table(tmp_path / "out")
    splits, labels, boxes, masks = EXPECTED[name]
    assert result.splits == dict(Counter(row.split for row in table.rows)) == splits
    assert set(table.classes()) == labels
    assert sum(row.entry is not None and len(row.entry.boxes) for row in table.rows) == boxes
    assert sum(row.mask_file is not None for row in table.rows) == masks
    for row in table.rows:
        sample = sample_of(row, FILL)
        assert sample.pixels.shape == (12, 16, 3)
        if row.entry is not None:
            assert tuple(sample.box.flatten().tolist()) == BOX
        if row.mask_file is not None:
            assert np.array_equal(sample.mask.numpy(), object_mask())


@every_set
def test_the_parent_of_the_archives_folder_and_the_folder_itself_are_the_same(name, tmp_path):
    folder, extra = make(name, tmp_path)
    import_published(name, folder, tmp_path / "outer", extra=extra)
    (inner,) = [p for p in folder.iterdir() if p.name != "segmentations"]
    inner = inner / "VOC2007" if name == "fod-a" else inner
    import_published(name, inner, tmp_path / "inner", extra=extra)
    assert contents(tmp_path / "inner") == contents(tmp_path / "outer")


@every_set
def test_another_folder_is_refused_with_the_expected_files(name, tmp_path):
    _, extra = make(name, tmp_path)
    image(tmp_path / "photos/holiday.jpg")
    with pytest.raises(L2R2Error, match=r"looked for|needs") as error:
        import_published(name, tmp_path / "photos", tmp_path / "out", extra=extra)
    assert str(tmp_path / "photos") in str(error.value)
    with pytest.raises(L2R2Error, match=r"no such folder|looked for"):
        import_published(name, tmp_path / "nowhere", tmp_path / "out", extra=extra)
    assert not (tmp_path / "out").exists()


@every_set
def test_a_set_that_is_not_whole_is_refused_before_anything_is_written(name, tmp_path):
    folder, extra = make(name, tmp_path)
    gone = folder / GONE[name]
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(L2R2Error, match=r"missing|looked for|needs|no mask"):
        import_published(name, folder, tmp_path / "out", extra=extra)
    assert not (tmp_path / "out").exists()


@every_set
def test_a_killed_import_continues_by_the_same_call(name, tmp_path):
    folder, extra = make(name, tmp_path)

    def killed(items, total):
        for number, item in enumerate(items):
            if number == total // 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        import_published(name, folder, tmp_path / "out", extra=extra, progress=killed)
    assert any((tmp_path / "out/images").rglob("*")) and not (tmp_path / "out/metadata.csv").exists()
    import_published(name, folder, tmp_path / "out", extra=extra)
    import_published(name, folder, tmp_path / "whole", extra=extra)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = import_published(name, folder, tmp_path / "out", extra=extra, progress=pytest.fail)
    assert (again.linked, again.copied) == (0, 0)


def test_images_are_links_unless_copies_are_requested(tmp_path):
    folder, _ = make("cub", tmp_path)
    source = folder / "CUB_200_2011/images/014.Indigo_Bunting/I_1.jpg"
    source.chmod(0o600)
    linked = import_published("cub", folder, tmp_path / "linked")
    copied = import_published("cub", folder, tmp_path / "copied", copy=True)
    assert (linked.linked, linked.copied, copied.linked, copied.copied) == (8, 0, 0, 8)
    name = "images/014.Indigo_Bunting/I_1.jpg"
    assert os.path.samefile(tmp_path / "linked" / name, source)
    assert not os.path.samefile(tmp_path / "copied" / name, source)
    assert (tmp_path / "copied" / name).read_bytes() == source.read_bytes()
    assert source.stat().st_mode & 0o777 == 0o600  # the user's file is as it was


def test_a_symbolic_link_in_the_archive_becomes_the_image_it_points_to(tmp_path):
    folder, _ = make("metashift", tmp_path)
    (photo,) = (folder / "MetaShift-Cat-Dog-indoor-outdoor/test/dog/dog(indoor)").iterdir()
    photo.rename(tmp_path / "genome.jpg")
    photo.symlink_to(tmp_path / "genome.jpg")
    import_published("metashift", folder, tmp_path / "out")
    (made,) = (tmp_path / "out/images/test/dog/dog(indoor)").iterdir()
    assert not made.is_symlink() and os.path.samefile(made, tmp_path / "genome.jpg")


def test_an_output_that_holds_something_else_is_left_alone(tmp_path):
    folder, _ = make("cub", tmp_path)
    out = tmp_path / "out"
    image(out / "own.jpg")
    with pytest.raises(L2R2Error, match="is not an import"):
        import_published("cub", folder, out)
    assert list(contents(out)) == ["own.jpg"]
    import_published("cub", folder, tmp_path / "birds")
    before = contents(tmp_path / "birds")
    image(folder / "CUB_200_2011/images/014.Indigo_Bunting/I_1.jpg", level=3)  # another version of the archive
    (folder / "CUB_200_2011/train_test_split.txt").write_text("1 0\n2 1\n3 1\n4 0\n")
    with pytest.raises(L2R2Error, match="from other files"):
        import_published("cub", folder, tmp_path / "birds")
    assert set(contents(tmp_path / "birds")) == set(before)


def test_a_table_cannot_name_files_outside_its_folder(tmp_path):
    folder, _ = make("iwildcam", tmp_path)
    file = folder / "iwildcam_v2.0/metadata.csv"
    image(tmp_path / "secret.jpg")
    file.write_text(file.read_text().replace("3.jpg", "../../../secret.jpg"))
    with pytest.raises(L2R2Error, match="not a path inside its folder"):
        import_published("iwildcam", folder, tmp_path / "out")


def l2r2(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["l2r2", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def test_the_command(tmp_path, monkeypatch, capsys):
    folder, cub = make("waterbirds", tmp_path)
    code, stdout, _ = l2r2(monkeypatch, capsys, "import", "waterbirds", folder, "-o", tmp_path / "out", "--with", cub)
    assert not code and "train 2, test 1, val 1" in stdout and "8 files are hard links" in stdout
    assert len(read_table(tmp_path / "out").of_split("train")) == 2
    code, _, stderr = l2r2(monkeypatch, capsys, "import", "waterbird", folder, "-o", tmp_path / "other")
    assert code == 1 and stderr.startswith('error: Unknown set "waterbird"; choose from waterbirds, in9, ')
    code, _, stderr = l2r2(monkeypatch, capsys, "import", "urbancars", folder, "-o", tmp_path / "other", "--with", cub)
    assert code == 1 and "takes no second folder" in stderr
    code, stdout, _ = l2r2(monkeypatch, capsys, "import", "--help")
    assert all(name in stdout for name in SETS if not name.startswith("spawrious")) and "spawrious-o2o-hard" in stdout
