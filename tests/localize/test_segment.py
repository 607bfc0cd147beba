"""Masks of SAM, SAM2 and EdgeTAM for the boxes of any localizer."""

import pytest
import torch

from l2r2_models import Detections, ViewSpec, make_views
from l2r2_models.boxes import read_boxes
from l2r2_models.errors import L2R2Error
from l2r2_models.localize import create_localizer
from l2r2_models.localize.localize_files import localize_to_file
from l2r2_models.localize.segment import Segmenter


@pytest.mark.parametrize("kind", ["sam", "sam2", "edgetam"])
def test_a_mask_is_the_networks_output_for_the_box(tiny, pictures, kind):
    localizer = create_localizer(f"center?share=0.8&masks={kind}:{tiny(kind)}", device="cpu")
    assert str(localizer.spec) == f"center?share=0.8&masks={kind}:{tiny(kind)}"
    found = localizer(pictures)
    network = localizer.segmenter.network
    for image, detections in zip(pictures, found):
        inputs = network.processor(images=image, input_boxes=[detections.boxes.tolist()], return_tensors="pt")
        with torch.inference_mode():
            out = network.model(**inputs, multimask_output=False)
        low = out.pred_masks[0, 0].float()  # [1, h, w] over the padded (sam) or stretched input
        assert detections.masks.shape == (1, image.height, image.width) and detections.masks.dtype == torch.bool
        if kind != "sam":
            up = torch.nn.functional.interpolate(low[None], (image.height, image.width), mode="bilinear", align_corners=False)[0]
            assert torch.equal(detections.masks, up > 0)
    (alone,) = localizer(pictures[1:2])
    assert torch.equal(alone.masks, found[1].masks)


def test_every_box_gets_its_own_mask_and_images_without_a_box_are_skipped(tiny, pictures, monkeypatch):
    segmenter = Segmenter(f"sam:{tiny('sam')}", torch.device("cpu"))
    boxes = [[2, 3, 20, 30], [30, 1, 58, 20]]
    found = Detections.from_lists(boxes, (40, 60), [0.9, 0.5], ["a", "b"])
    (both,) = segmenter(pictures[:1], [found])
    for i in range(2):
        (one,) = segmenter(pictures[:1], [found.select(torch.tensor([i]))])
        assert (both.masks[i] == one.masks[0]).float().mean() > 0.99 and both.labels == ("a", "b")
    monkeypatch.setattr(segmenter, "network", None)
    assert segmenter(pictures[:1], [found.above(1)])[0].masks is None


def test_masks_go_through_a_box_file_into_the_views(tiny, dataset, tmp_path):
    from l2r2_models.data.dataset import ViewDataset, sample_of
    from l2r2_models.data.table import read_table

    localizer = create_localizer(f"full?masks=sam2:{tiny('sam2')}", device="cpu")
    paths = [row.path for row in read_table(dataset).rows]
    localize_to_file(localizer, paths, tmp_path / "boxes.json")
    table = read_table(dataset, boxes=tmp_path / "boxes.json")
    sample = sample_of(table.rows[0], (0, 0, 0))
    entry = read_boxes(tmp_path / "boxes.json").find(paths[0])
    assert torch.equal(sample.mask, entry.masks[0].decode()) and 0 < sample.mask.float().mean() < 1
    spec = ViewSpec(size=32, fg_mode="masked_crop")
    item = ViewDataset(table, ("blue", "green", "red"), spec, ("full", "fg"))[0]
    expected = make_views([sample.pixels], sample.box[None], spec, masks=[sample.mask]).fg[0]
    assert torch.equal(item["fg"], expected)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ("sam3:x", "Masks come from sam:SOURCE, sam2:SOURCE or edgetam:SOURCE"),
        ("sam", "Masks come from sam:SOURCE"),
        ("sam:nobody/nothing", "hf download nobody/nothing"),
        ("a&masks=b", "2 values for masks"),
    ],
)
def test_segmenters_that_cannot_be_had_are_refused(masks, message):
    with pytest.raises(L2R2Error, match=message):
        create_localizer(f"full?masks={masks}")
