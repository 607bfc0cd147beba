"""Fusions fitted on held-out objects on other backgrounds."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset, write_run
from PIL import Image

from l2r2_models import L2R2Error
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.swap import swapped
from l2r2_models.data.table import ImageTable, Row, read_table
from l2r2_models.evaluate.backgrounds import COPIES, backgrounds_in, default_backgrounds, logits_to_fit
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.evaluate.fuse import fit, observations
from l2r2_models.evaluate.logits import BranchLogits


@pytest.fixture
def own_run(tmp_path):
    return write_run(tmp_path / "run")


def test_swapped_rows_change_the_prediction_of_full_and_hardly_that_of_fg(own_run, dataset):
    checkpoint, table = hub.load_checkpoint(own_run), read_table(dataset)
    val, train = table.of_split("val"), table.of_split("train")
    plain = logits_to_fit(checkpoint, val, train)
    moved = logits_to_fit(checkpoint, val, train, "swapped")
    both = logits_to_fit(checkpoint, val, train, "both")
    assert len(plain) == 12 and len(moved) == COPIES * 12 and len(both) == (1 + COPIES) * 12
    assert torch.equal(both.logits["full"][:12], plain.logits["full"]) and torch.equal(both.labels[12:], moved.labels)
    assert observations(both).tolist() == pytest.approx(12 * [1.0] + 36 * [1 / 3])
    changed = {b: (moved.logits[b] - plain.logits[b].repeat_interleave(COPIES, 0)).abs().mean() for b in ("full", "fg")}
    assert changed["fg"] < 0.5 * changed["full"]


def test_the_backgrounds_are_those_of_training_rows_never_of_another_split(own_run, dataset):
    table = read_table(dataset)
    (own_run / "run.json").write_text(json.dumps({"train_files": table.of_split("train").names()}))
    for path in (dataset / "images").glob("test_*"):
        path.write_bytes(b"not an image")  # whoever looks at a test image fails
    report = fit_run(own_run, dataset, "val", backgrounds="both")
    assert report.rows == 48 and report.warnings == ()
    assert hub.load_checkpoint(own_run).training["fusion_fit"]["backgrounds"] == "both"


def test_a_full_branch_that_the_background_misleads_is_caught(tmp_path):
    """fg right in 80 % of the rows; full, very sure, right on plain rows and misled on swapped ones."""
    generator = torch.Generator().manual_seed(0)

    def rows(misled: bool) -> BranchLogits:
        labels = torch.arange(200) % 5
        right = torch.rand(200, generator=generator) < 0.8
        fg = 3 * torch.eye(5)[torch.where(right, labels, (labels + 1) % 5)] + torch.randn(200, 5, generator=generator)
        full = 12 * torch.eye(5)[(labels + 2) % 5 if misled else labels] + torch.randn(200, 5, generator=generator)
        table = ImageTable(tmp_path, tuple(Row(tmp_path / f"{i}.png") for i in range(200)))
        return BranchLogits({"full": full, "fg": fg}, torch.ones(200, dtype=torch.bool), labels, table)

    plain, moved = fit(rows(False)), fit(rows(True))
    misled = rows(True)
    for name in ("robust", "scaled_average", "scaled_weighted_average"):

        def reached(fitted, name=name):
            fused = fitted[name].fusion(misled.logits["fg"], misled.logits["full"][None])
            return float((fused.argmax(-1) == misled.labels).double().mean())

        assert reached(plain) < 0.2 and reached(moved) > 0.6, name


def test_copies_of_one_image_stay_in_one_fold(tmp_path):
    """Branches that know nothing about new images: copies of a row must not let a fusion recognize it."""
    generator = torch.Generator().manual_seed(0)
    logits = {b: torch.randn(40, 10, generator=generator).repeat(5, 1) for b in ("full", "fg")}
    labels = torch.randint(0, 10, (40,), generator=generator).repeat(5)
    table = ImageTable(tmp_path, tuple(Row(tmp_path / f"{i}.png") for i in range(40)) * 5)
    data = BranchLogits(logits, torch.ones(200, dtype=torch.bool), labels, table)
    assert fit(data, ["concat_mlp"])["concat_mlp"].accuracy < 0.35


def test_the_swapped_background_is_independent_of_the_class(own_run, tmp_path):
    data = write_dataset(tmp_path / "data", splits=("train", "val"))
    table = read_table(data)
    found = logits_to_fit(hub.load_checkpoint(own_run), table.of_split("val"), table.of_split("train"), "swapped")
    own = [row.background.label == row.label for row in found.table.rows]
    assert 0 < sum(own) < len(own) / 2 and all(row.background.path != row.path for row in found.table.rows)


def test_what_one_physical_object_teaches_does_not_count_on_others(tmp_path):
    """40 photos of each of ten objects: fg mistakes each class for the next, as a fusion with a number a class can learn."""
    labels = torch.arange(400) % 5
    noise = torch.randn(2, 400, 5, generator=torch.Generator().manual_seed(0))
    objects = torch.arange(400) % 10
    fg = torch.eye(5)[labels] + 0.3 * noise[0]
    fg[:, 0] += 1.5 * (objects >= 5)  # the second five objects are taken for class 0
    columns = [(("object", f"object {o}" if o else ""),) for o in objects.tolist()]
    table = ImageTable(tmp_path, tuple(Row(tmp_path / f"{i}.png", columns=c) for i, c in enumerate(columns)))
    data = BranchLogits({"full": 0.1 * noise[1], "fg": fg}, torch.ones(400, dtype=torch.bool), labels, table)
    name = "weighted_logits"
    alone, grouped = fit(data, [name])[name], fit(data, [name], group="object")[name]
    assert grouped.accuracy < alone.accuracy - 0.02
    units = [len(found.columns["plain"].right) for found in (alone, grouped)]
    assert units == [400, 9 + 40]  # an empty value is no group
    assert all(torch.equal(a, b) for a, b in zip(alone.fusion.parameters(), grouped.fusion.parameters()))  # fitted on all rows


def test_groups_that_do_not_exist_or_are_too_few_are_sentences(own_run, dataset):
    with pytest.raises(L2R2Error, match='has no column "site" in the metadata; there are'):
        fit_run(own_run, dataset, "val", group="site")
    rows = (dataset / "metadata.csv").read_text().splitlines()
    with_site = "\n".join(f"{row},{'site' if i == 0 else i % 3}" for i, row in enumerate(rows))
    (dataset / "metadata.csv").write_text(with_site)
    with pytest.raises(L2R2Error, match='The column "site" has 3 groups of images with an object; fitting takes at least 5'):
        fit_run(own_run, dataset, "val", group="site")


def test_unknown_backgrounds_and_rows_without_objects_are_sentences(own_run, dataset, tmp_path):
    with pytest.raises(L2R2Error, match='Unknown backgrounds "other"; choose from plain, swapped, both'):
        fit_run(own_run, dataset, "val", backgrounds="other")
    bare = write_dataset(tmp_path / "bare", splits=("val",))
    text = "\n".join(",".join(line.split(",")[:3]) for line in (bare / "metadata.csv").read_text().splitlines())
    (bare / "metadata.csv").write_text(text)
    with pytest.raises(L2R2Error, match="no image has a box or mask"):
        fit_run(own_run, bare, "val", backgrounds="swapped")


def test_any_folder_of_images_can_lend_backgrounds(own_run, dataset, tmp_path):
    """Empty frames of a new site: no boxes, no labels; each is taken as a whole."""
    for i in range(4):
        Image.new("RGB", (80, 50), (10 * i, 200, 0)).save(made(tmp_path / "empty") / f"{i}.png")
    checkpoint, val = hub.load_checkpoint(own_run), read_table(dataset).of_split("val")
    scenes = backgrounds_in(tmp_path / "empty")
    table = swapped(val, scenes, copies=3, classes="any", whole=True)
    pixels = sample_of(table.rows[0], (0, 0, 0)).pixels
    assert int((pixels[..., 1] == 200).sum()) > pixels[..., 1].numel() / 2  # most of it is a scene now
    report = fit_run(own_run, dataset, "val", scenes=tmp_path / "empty", save=False)
    assert report.backgrounds == "both" and report.rows == 48
    assert default_backgrounds(val, scenes, checkpoint.box_threshold) == "plain"  # unless asked for, an object may be on them
    with pytest.raises(L2R2Error, match="no image"):
        fit_run(own_run, dataset, "val", scenes=made(tmp_path / "nothing"))


def test_without_boxes_or_with_too_few_backgrounds_the_default_is_plain(own_run, dataset, tmp_path):
    val = read_table(dataset).of_split("val")
    assert default_backgrounds(val, val, 0.0) == "both"
    assert default_backgrounds(val, val.of_names(val.names()[:COPIES]), 0.0) == "plain"
    bare = replace(val, rows=tuple(replace(row, entry=None) for row in val.rows))
    assert default_backgrounds(bare, val, 0.0) == "plain"


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder
