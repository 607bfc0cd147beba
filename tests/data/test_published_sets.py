"""Particularities of single published sets."""

import numpy as np
import pytest
from published_sets import fod_a, image, make

from l2r2_models import L2R2Error
from l2r2_models.data.published import import_published
from l2r2_models.data.published.fod_a import first_and_last
from l2r2_models.data.published.spawrious import AT_HOME, TOTAL, read_spawrious
from l2r2_models.data.table import read_table


def columns(table, *names):
    return [
        tuple({**dict(row.columns), "label": row.label, "split": row.split}.get(name) for name in names) for row in table.rows
    ]


def imported(name, tmp_path, **options):
    folder, extra = make(name, tmp_path)
    import_published(name, folder, tmp_path / "out", extra=extra, **options)
    return read_table(tmp_path / "out")


def test_waterbirds_codes_are_read_as_the_authors_document_them(tmp_path):
    table = imported("waterbirds", tmp_path)
    assert columns(table, "label", "split", "background", "species") == [
        ("waterbird", "train", "water", "Black_footed_Albatross"),
        ("waterbird", "test", "land", "Black_footed_Albatross"),
        ("landbird", "train", "land", "Indigo_Bunting"),
        ("landbird", "val", "water", "Indigo_Bunting"),
    ]


def test_waterbirds_without_cub_has_no_boxes_and_an_unknown_code_is_refused(tmp_path):
    folder, _ = make("waterbirds", tmp_path)
    import_published("waterbirds", folder, tmp_path / "plain")
    assert all(row.entry is None and row.mask_file is None for row in read_table(tmp_path / "plain").rows)
    file = folder / "waterbird_complete95_forest2water2/metadata.csv"
    file.write_text(file.read_text().replace("I_1.jpg,0,0,", "I_1.jpg,0,3,"))
    with pytest.raises(L2R2Error, match=r'metadata.csv: split is "3"; it must be one of 0, 1, 2'):
        import_published("waterbirds", folder, tmp_path / "out")


def test_in9_backgrounds_are_the_classes_that_they_were_taken_from(tmp_path):
    found = set(columns(imported("in9", tmp_path), "split", "label", "background"))
    assert {("test_original", "dog", "dog"), ("test_mixed_same", "dog", "dog"), ("test_mixed_rand", "dog", "bird")} <= found
    assert ("test_only_bg_t", "bird", "") in found


def test_in9_masks_are_arrays_without_pickles(tmp_path):
    folder, _ = make("in9", tmp_path)
    np.save(folder / "bg_challenge/fg_mask/val/00_dog/n02085936_00001.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(L2R2Error, match="is not a NumPy array"):
        import_published("in9", folder, tmp_path / "out")


def test_spawrious_takes_97_and_87_percent_at_home_and_the_rest_at_the_shared_place(tmp_path):
    names = [f"{i:04d}.png" for i in range(TOTAL + 5)]
    image(tmp_path / "one.png")
    for place, breed in (("jungle", "bulldog"), ("beach", "bulldog")):
        for group in range(2):
            folder = tmp_path / f"full/{group}/{place}/{breed}"
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).hardlink_to(tmp_path / "one.png")
    for breed, places in {
        "bulldog": "mountain",
        "dachshund": "mountain snow",
        "labrador": "snow desert",
        "corgi": "desert jungle",
    }.items():
        for place in (*places.split(), "beach"):
            for group in range(2):
                if not (tmp_path / f"full/{group}/{place}/{breed}").exists():
                    image(tmp_path / f"full/{group}/{place}/{breed}/0.png")
    items = [item for item in read_spawrious("o2o-hard", tmp_path / "full") if item.columns["label"] == "bulldog"]
    for group, count in enumerate(AT_HOME):
        mine = [
            item.columns["background"]
            for item in items
            if item.columns["split"] == "train" and item.columns["group"] == str(group)
        ]
        assert (mine.count("jungle"), mine.count("beach")) == (count, TOTAL - count)
    assert {item.columns["background"] for item in items if item.columns["split"] == "test"} == {"mountain"}


@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_spawrious_many_to_many_swaps_the_locations_of_the_pairs(level, tmp_path):
    for place in ("desert", "jungle", "dirt", "mountain", "snow", "beach"):
        for breed in ("bulldog", "dachshund", "labrador", "corgi"):
            image(tmp_path / f"0/{place}/{breed}/0.png")
    places = {}
    for item in read_spawrious(f"m2m-{level}", tmp_path):
        places.setdefault((item.columns["split"], item.columns["label"]), set()).add(item.columns["background"])
    assert places["train", "bulldog"] == places["train", "dachshund"] == places["test", "labrador"] == places["test", "corgi"]
    assert places["test", "bulldog"] == places["test", "dachshund"] == places["train", "labrador"] == places["train", "corgi"]
    assert places["train", "bulldog"].isdisjoint(places["test", "bulldog"])


def test_metashift_counts_a_photo_of_two_contexts_once(tmp_path):
    assert set(columns(imported("metashift", tmp_path), "split", "label", "background")) == {
        ("train", "cat", "indoor+sofa"),
        ("train", "dog", "outdoor"),
        ("test", "cat", "outdoor"),
        ("test", "dog", "indoor"),
    }


def test_metashifts_mixed_variant_is_refused_and_its_pickle_never_opened(tmp_path):
    for place in ("train/cat", "train/dog", "val_out_of_domain/cat"):
        image(tmp_path / "mixed" / place / "1.jpg")
    with pytest.raises(L2R2Error, match="pickle, which is not read"):
        import_published("metashift", tmp_path / "mixed", tmp_path / "out")


def test_urbancars_tells_the_background_from_the_object_beside_it(tmp_path):
    assert set(columns(imported("urbancars", tmp_path), "label", "background", "co_occurring_object")) == {
        ("urban", "urban", "country"),
        ("country", "urban", "country"),
    }


def test_counteranimal_keeps_imagenets_class_numbers(tmp_path):
    assert ("ice bear", "296", "sky", "test_counter") in columns(
        imported("counteranimal", tmp_path), "label", "imagenet_class", "background", "split"
    )


def test_hard_imagenet_needs_imagenet(tmp_path):
    folder, _ = make("hard-imagenet", tmp_path)
    with pytest.raises(L2R2Error, match="--with"):
        import_published("hard-imagenet", folder, tmp_path / "out")


def test_iwildcam_sites_can_be_held_out(tmp_path):
    table = imported("iwildcam", tmp_path)
    assert sorted(table.of_split("train").column("site")) == ["0", "1"]
    assert set(table.column("sequence")) == {"7"}
    assert columns(table, "split", "label")[:2] == [("train", "empty"), ("train", "meleagris ocellata")]


def test_a_box_that_is_no_box_is_named(tmp_path):
    folder, _ = make("cub", tmp_path)
    (folder / "CUB_200_2011/bounding_boxes.txt").write_text("1 3.0 2.0\n")
    with pytest.raises(L2R2Error, match=r'the box of image 1 is not four numbers \("3.0 2.0"\)'):
        import_published("cub", folder, tmp_path / "out")


def test_fod_a_is_split_in_the_order_of_its_frames(tmp_path):
    import_published("fod-a", fod_a(tmp_path / "archive", frames=41), tmp_path / "out")  # 40 with one object
    table = read_table(tmp_path / "out")
    assert {row.label: dict(row.columns)["home_background"] for row in table.rows} == {
        "ClampPart": "dry_bright",
        "Cutter": "dry_dim",
    }
    names = {
        split: [row.path.stem for row in table.of_split(split).rows if row.label == "ClampPart"] for split in ("train", "test_id")
    }
    assert names["train"] == [f"{i:06d}" for i in range(28)]
    assert names["test_id"] == [f"{i:06d}" for i in range(30, 40)]


def test_fod_a_frames_are_those_of_the_published_tables():
    """ClampPart, dry and bright: 129 frames from 002544.jpg on, of which the tables' sets hold these."""
    frames = [(str(number), (0.0, 0.0, 1.0, 1.0)) for number in range(2544, 2673)]
    first, last = ([int(stem) for stem, _ in part] for part in first_and_last(frames))
    assert (len(first), first[:5], first[-1]) == (60, [2544, 2545, 2547, 2548, 2550], 2632)
    assert (len(last), last[:2], last[-1]) == (30, [2640, 2641], 2671)


def test_a_broken_annotation_is_named(tmp_path):
    folder, _ = make("fod-a", tmp_path)
    (folder / "FODPascalVOCFormat-V.2.1/VOC2007/Annotations/000002.xml").write_text("<annotation>")
    with pytest.raises(L2R2Error, match=r"000002.xml: cannot be read as a Pascal VOC annotation"):
        import_published("fod-a", folder, tmp_path / "out")


def test_eth80_objects_and_views_are_those_of_the_published_tables(tmp_path):
    table = imported("eth80", tmp_path)
    assert set(columns(table, "object_instance", "split")) == {
        ("apple_1", "train"),
        ("apple_8", "test"),
        ("car_4", "train"),
        ("car_8", "test"),
    }
    assert sorted(row.path.stem for row in table.rows if row.path.stem.startswith("apple1")) == [
        "apple1-000-000",
        "apple1-022-090",
    ]
