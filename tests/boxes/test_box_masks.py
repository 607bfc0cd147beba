"""Masks in box files: COCO RLE round trips, the views that use them, and files whose masks do not match."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2r2_models.boxes import BoxEntry, BoxTable, Rle, read_boxes, write_boxes
from l2r2_models.boxes.detections import Detections
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.table import read_table
from l2r2_models.errors import L2R2Error


def naive_decode(size, counts):
    """The runs of COCO's format, pixel by pixel, from its description; counts as a list or as the compressed string."""
    if isinstance(counts, str):
        groups, group = [], []
        for character in counts:
            group.append(ord(character) - 48)
            if group[-1] < 32:
                groups.append(group)
                group = []
        counts = []
        for group in groups:
            bits = "".join(format(part & 31, "05b") for part in reversed(group))
            number = int(bits, 2) - (1 << len(bits) if bits[0] == "1" else 0)
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    pixels, value = [], False
    for count in counts:
        pixels += [value] * count
        value = not value
    height, width = size
    return torch.tensor([[pixels[x * height + y] for x in range(width)] for y in range(height)])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.03, 0.5, 1.0]))
def test_a_mask_survives_and_a_naive_decoder_reads_it(height, width, seed, share):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    rle = Rle.encode(mask)
    assert torch.equal(rle.decode(), mask) and torch.equal(naive_decode((height, width), rle.counts), mask)
    assert Rle.from_coco(rle.to_coco()) == rle


def test_long_runs_and_uncompressed_counts_are_read():
    mask = torch.zeros(900, 1200, dtype=torch.bool)
    mask[100:700, 5:1100] = True
    rle = Rle.encode(mask)
    assert torch.equal(rle.decode(), mask)
    assert Rle.from_coco({"size": [2, 3], "counts": [1, 2, 3]}).decode().tolist() == naive_decode((2, 3), [1, 2, 3]).tolist()


def table_with_masks():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 4:20, 10:30] = True
    masks[1, 25:39, 3:9] = True
    found = Detections(torch.tensor([[10.0, 4, 30, 20], [3, 25, 9, 39]]), torch.tensor([0.9, 0.5]), (40, 60), ("a", ""), masks)
    entries = {"train_000.png": BoxEntry.from_detections(found), "train_001.png": BoxEntry(failure="out of memory")}
    return BoxTable(entries, info={"localizer": "full"}), found


@pytest.mark.parametrize("name", ["megadetector.json", "coco.json", "parquet.parquet"])
def test_every_format_with_masks_gives_boxes_masks_failures_and_origin_back(tmp_path, name):
    table, found = table_with_masks()
    write_boxes(table, tmp_path / name, name.split(".")[0])
    read = read_boxes(tmp_path / name)
    back = read.entries["train_000.png"].detections((40, 60), "train_000.png")
    assert torch.equal(back.masks, found.masks) and torch.allclose(back.boxes, found.boxes, atol=1e-3)
    assert read.entries["train_001.png"].failure == "out of memory" and read.info == {"localizer": "full"}


def test_the_best_boxs_mask_is_the_mask_of_a_training_row(tmp_path, dataset):
    table, found = table_with_masks()
    write_boxes(table, tmp_path / "boxes.json")
    row = next(r for r in read_table(dataset, boxes=tmp_path / "boxes.json").rows if r.path.name == "train_000.png")
    assert torch.equal(sample_of(row, (0, 0, 0)).mask, found.masks[0])


def test_a_box_without_a_mask_among_others_is_its_own_mask():
    entry = BoxEntry(((1, 1, 3, 3), (0, 0, 2, 1)), (0.5, 0.9), ("", ""), masks=(Rle.encode(torch.eye(4).bool()), None))
    best, other = entry.detections((4, 4), "a.png").masks
    assert torch.equal(other, torch.eye(4).bool()) and best.nonzero().tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [4, 4], "counts": [3, 2]}, "do not add up to its 4x4 pixels"),
        ({"size": [4, 4], "counts": [20, -4]}, "do not add up"),
        ({"size": [4], "counts": [16]}, "is not COCO RLE"),
        ({"size": [4, 4], "counts": "é"}, "is not COCO RLE"),
        ({"size": [4, 4], "counts": "o"}, "is not COCO RLE"),
        ("mask", "is not COCO RLE"),
        ({"size": [4, 4], "counts": [16]}, None),
    ],
)
def test_masks_that_do_not_fit_are_refused_with_the_images_name(tmp_path, mask, message):
    image = {"file": "a.png", "detections": [{"category": "1", "conf": 1, "bbox": [0, 0, 1, 1], "mask": mask}]}
    (tmp_path / "boxes.json").write_text(json.dumps({"info": {}, "images": [image]}))
    with pytest.raises(L2R2Error, match=r"boxes.json: a\.png: .*" + message if message else "the image is 6x5"):
        read_boxes(tmp_path / "boxes.json").entries["a.png"].detections((5, 6), "a.png")


def test_parquet_of_others_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(L2R2Error, match="is not a box file of"):
        read_boxes(tmp_path / "a.parquet")
    with pytest.raises(L2R2Error, match="is not readable Parquet"):
        read_boxes(tmp_path / "b.parquet")
