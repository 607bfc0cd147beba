"""The fusion that multiplies fg's confidence by the box score, from the box file to the prediction."""

import json

import pytest
import torch
from conftest import write_run

from l2r2_models import Predictor
from l2r2_models.boxes.detections import Detections
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.fuse import fuse
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.fusion import create_fusion, fuse_branches
from l2r2_models.images import load_image


@pytest.fixture
def weighing(tmp_path):
    return write_run(tmp_path / "run", fusion="objectness_max_confidence")


def rows(count=50):
    generator = torch.Generator().manual_seed(0)
    return {b: 3 * torch.randn(count, 4, generator=generator) for b in ("full", "fg")}


def test_it_is_the_more_confident_of_score_times_fg_and_full():
    fusion, logits = create_fusion("objectness_max_confidence", 2, 4), rows()
    scores = torch.rand(50, generator=torch.Generator().manual_seed(1))
    sure = {b: z.softmax(-1).amax(-1) for b, z in logits.items()}
    for i, fused in enumerate(fuse_branches(fusion, logits, None, scores)):
        wins = "fg" if scores[i] * sure["fg"][i] >= sure["full"][i] else "full"
        assert torch.equal(fused, logits[wins][i])
    same = create_fusion("max_confidence", 2, 4)
    assert torch.equal(fuse_branches(fusion, logits, None, torch.ones(50)), fuse_branches(same, logits))
    assert torch.equal(fuse_branches(fusion, logits), fuse_branches(same, logits))
    assert torch.equal(fuse_branches(fusion, logits, None, torch.zeros(50)), logits["full"])


def test_scores_come_from_the_box_file_in_evaluation_and_prediction(weighing, dataset, tmp_path):
    found = {}
    for score in (1.0, 0.3):
        (tmp_path / "boxes.json").write_text(
            json.dumps(
                {
                    "info": {},
                    "detection_categories": {},
                    "images": [
                        {
                            "file": f"images/val_{i:03d}.png",
                            "detections": [{"category": "1", "conf": score, "bbox": [0.1, 0.1, 0.5, 0.5]}],
                        }
                        for i in range(12)
                    ],
                }
            )
        )
        checkpoint, table = hub.load_checkpoint(weighing), read_table(dataset, boxes=tmp_path / "boxes.json").of_split("val")
        logits = branch_logits(checkpoint, table, weighing / "logits")
        stored = branch_logits(checkpoint, table, weighing / "logits")
        assert logits.objectness.tolist() == pytest.approx([score] * 12) and torch.equal(stored.objectness, logits.objectness)
        found[score] = fuse(checkpoint.model.fusion, logits)
        entries = {str(row.path): row.entry for row in table.rows}
        answers = list(Predictor(checkpoint, device="cpu").predict_files([row.path for row in table.rows], entries))
        assert [checkpoint.labels[i] for i in found[score].argmax(-1)] == [a.label for a in answers]
        assert [a.objects[0].score for a in answers] == pytest.approx(found[score].softmax(-1).amax(-1).tolist(), abs=1e-5)
    assert torch.equal(found[0.3], logits.logits["full"]) and not torch.equal(found[1.0], found[0.3])


def test_the_box_with_the_highest_product_labels_the_image(weighing, dataset):
    predictor = Predictor.from_pretrained(weighing, device="cpu")
    path = next((dataset / "images").glob("val_*"))
    image = load_image(path)
    boxes = Detections.from_lists(
        [[0, 0, 20, 20], [20, 5, 55, 35], [5, 10, 40, 38]], (image.height, image.width), scores=[0.9, 0.85, 0.8]
    )
    objects = predictor(path, boxes).objects
    products = [o.fg.score * o.box_score for o in objects]
    assert products == sorted(products, reverse=True) and len(objects) == 3
