"""Views that are cut after the workers are those that the workers cut."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from l2r2_models import ViewSpec
from l2r2_models.boxes import BoxEntry
from l2r2_models.data.augment import Augment
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.loader import UNCUT, ViewLoader, collate
from l2r2_models.data.table import read_table

PLAIN = dict(mean=(0.5,) * 3, std=(0.2,) * 3)
CASES = {
    "crop": (ViewSpec(size=24, **PLAIN), {"augment": Augment()}),
    "reduced files": (ViewSpec(size=8, decode="scaled", **PLAIN), {"augment": None}),
    "sizes": (ViewSpec(size=24, sizes={"full": 16}, **PLAIN), {"augment": Augment()}),
    "own aspect ratio": (ViewSpec(size=32, patch=8, decode="scaled", **PLAIN), {"augment": Augment()}),
    "masked crop": (ViewSpec(size=24, fg_mode="masked_crop", **PLAIN), {"augment": Augment()}),
    "masked in the network": (ViewSpec(size=24, fg_mode="late", **PLAIN), {"augment": Augment()}),
    "other backgrounds": (ViewSpec(size=24, **PLAIN), {"augment": Augment(), "swapped_views": ("full", "fg")}),
    "targets": (ViewSpec(size=24, **PLAIN), {"augment": Augment(), "locate": True, "segment": True, "objectness": True}),
}


def batches(dataset, case, loader, cut, **options):
    spec, of_rows = CASES[case]
    table = read_table(dataset).of_split("train")
    bare = replace(table.rows[1], entry=BoxEntry())  # a row without an object
    table = replace(table, rows=(table.rows[0], bare, *table.rows[2:]))
    rows = ViewDataset(table, table.classes(), spec, ("full", "fg"), cut=cut, seed=3, **of_rows)
    return list(loader(rows, batch_size=5, **options))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_batches_are_those_of_the_workers(dataset, case, workers):
    expected = batches(dataset, case, DataLoader, cut=True, collate_fn=collate)
    found = batches(dataset, case, ViewLoader, cut=False, device="cpu", num_workers=workers)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name].nan_to_num(-1.0), other[name].nan_to_num(-1.0)), name
    assert not all(batch["has_fg"].all() for batch in found)


def test_workers_send_pixels_and_no_views(dataset):
    spec, options = CASES["crop"]
    table = read_table(dataset).of_split("train")
    item = ViewDataset(table, table.classes(), spec, ("full", "fg"), cut=False, **options)[0]
    assert item.keys() == {"uncut", "labels"} and item["uncut"].pixels.dtype == torch.uint8


@pytest.mark.parametrize("case", ["masked crop", "other backgrounds", "reduced files"])
def test_a_batch_travels_in_few_tensors(dataset, case):
    """Each tensor that a worker sends takes a file descriptor, of which a process often has 1,024."""
    spec, options = CASES[case]
    table = read_table(dataset).of_split("train")
    rows = ViewDataset(table, table.classes(), spec, ("full", "fg"), cut=False, **options)
    batch = ViewLoader(rows, device="cpu", batch_size=12).collate_fn([rows[i] for i in range(12)])
    tensors = [*batch.values(), *(value for key in UNCUT if key in batch for value in batch[key].values())]
    assert sum(isinstance(value, torch.Tensor) for value in tensors) <= 6


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_cuts_what_the_workers_cut(dataset, case):
    expected = batches(dataset, case, DataLoader, cut=True, collate_fn=collate)
    found = batches(dataset, case, ViewLoader, cut=False, device="cuda", num_workers=2, pin_memory=True)
    for one, other in zip(found, expected):
        for name in ("full", "fg", "swapped_full", "swapped_fg", "mask"):
            if name in other:
                assert one[name].is_cuda
                assert torch.allclose(one[name].cpu(), other[name], atol=0.02), name
        assert torch.equal(one["has_fg"].cpu(), other["has_fg"])
