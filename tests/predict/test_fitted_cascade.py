"""A cascade fitted for a stated loss of accuracy: within it on the rows of the fit, and fg's own answers where fg decides."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import sentence, write_dataset, write_run

from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.table import ImageTable, Row
from l2r2_models.evaluate.cascade import fit_cascade
from l2r2_models.evaluate.logits import BranchLogits
from l2r2_models.fusion.confidence import confidence


def rows_of(fg, labels, has_fg, swapped):
    rows = tuple(Row(f"{i}.jpg", background="b" if s else None) for i, s in enumerate(swapped))
    return BranchLogits({"full": torch.zeros_like(fg), "fg": fg}, has_fg, labels, ImageTable(None, rows))


def made(seed, count=300, classes=4):
    """Logits of an fg that is right where it is confident, and of a fusion that is right more often."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, classes).float()
    fg = 2 * truth + 1.5 * torch.randn(count, classes, generator=generator)
    fused = fg + 1.5 * truth + torch.randn(count, classes, generator=generator)
    has_fg = torch.rand(count, generator=generator) < 0.9
    swapped = torch.rand(count, generator=generator) < 0.5
    return fused, rows_of(fg, labels, has_fg, swapped.tolist()), swapped


def macro(predicted, labels):
    return sum((predicted[labels == k] == k).double().mean() for k in labels.unique()) / len(labels.unique())


def plain(predicted, labels):
    return (predicted == labels).double().mean()


@pytest.mark.parametrize(("metric", "accuracy"), [("accuracy", plain), ("macro_accuracy", macro)])
@pytest.mark.parametrize("loss", [0.5, 2.0, 5.0])
def test_what_is_lost_is_within_what_was_stated_on_every_kind_of_rows(loss, metric, accuracy):
    fused, data, swapped = made(0)
    found = fit_cascade(fused, data, loss, metric)

    def losses(threshold):
        decided = data.has_fg & (confidence(data.logits["fg"]) >= threshold)
        predicted = torch.where(decided[:, None], data.logits["fg"], fused).argmax(-1)
        return decided, {
            kind: 100 * float(accuracy(fused[rows].argmax(-1), data.labels[rows]) - accuracy(predicted[rows], data.labels[rows]))
            for kind, rows in (("plain", ~swapped), ("swapped", swapped))
        }

    decided, lost = losses(found.threshold)
    assert found.lost == pytest.approx(lost) and max(lost.values()) <= loss + 1e-9
    assert found.skipped["plain"] == pytest.approx(float(decided[~swapped].double().mean())) and 0 < found.skipped["plain"] < 1
    values = confidence(data.logits["fg"])[data.has_fg].sort().values
    lower = values[values < found.threshold]
    assert max(losses(float(lower[-1]))[1].values()) > loss  # a lower threshold loses more than stated
    assert all(max(losses(float(v))[1].values()) <= loss + 1e-9 for v in values[values > found.threshold])


def test_a_threshold_does_not_rest_on_luck_below_a_loss():
    """The least confident rows make good for those above; a threshold that takes all of them in would lose nothing."""
    fg = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    data = rows_of(fg, torch.tensor([0, 1, 0, 0]), torch.ones(4, dtype=torch.bool), [False] * 4)
    fused = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])  # right, right, right, wrong
    found = fit_cascade(fused, data, 1.0)
    assert found.skipped == {"plain": 0.25} and found.lost == {"plain": 0.0}
    sure = confidence(fg)
    assert found.threshold == pytest.approx(float(sure[0] + sure[1]) / 2)
    with pytest.raises(L2R2Error, match=r"none of these 1 rows without losing more than 1 points"):
        fit_cascade(fused[1:2], data.select(torch.tensor([False, True, False, False])), 1.0)


@pytest.fixture
def fitted(tmp_path, l2r2):
    """A run with a cascade for a loss of 60 points, and the validation images it was fitted on."""
    data, run = write_dataset(tmp_path / "data", splits=("val", "test")), write_run(tmp_path / "run")
    done = l2r2("fuse", run, data, "--val-backgrounds", "plain", "--method", "average", "--cascade", 60)
    assert done.returncode == 0 and "cascade: fg alone decides" in done.stdout and "of the plain rows" in done.stdout
    return run, data


def with_threshold(run, loss, threshold):
    config = json.loads((run / "config.json").read_text())
    config["l2r2"]["training"]["fusion_fit"]["cascade"] = {"loss": loss, "threshold": threshold}
    (run / "config.json").write_text(json.dumps(config))


def objects_of(path):
    return [o for image in json.loads(path.read_text())["images"] for o in image["objects"]]


def test_what_fuse_stores_is_what_predict_uses_and_fg_answers_what_it_decides(fitted, tmp_path, l2r2):
    run, data = fitted
    test = ("predict", run, data, "--split", "test", "--top", 1)
    assert load_checkpoint(run).training["fusion_fit"]["cascade"]["loss"] == 60
    assert l2r2(*test, "-o", tmp_path / "all.json").returncode == 0
    everything = objects_of(tmp_path / "all.json")
    sure = sorted(o["fg"]["score"] for o in everything)
    threshold = (sure[3] + sure[4]) / 2
    with_threshold(run, 60, threshold)
    done = l2r2(*test, "--cascade", 60, "-o", tmp_path / "cascade.json")
    assert done.returncode == 0 and "not needed for 8 of 12 objects" in done.stdout
    assert json.loads((tmp_path / "cascade.json").read_text())["settings"]["cascade"]["threshold"] == threshold
    for o, one in zip(everything, objects_of(tmp_path / "cascade.json")):
        if o["fg"]["score"] >= threshold:
            assert "full" not in one and one["reason"] == "the object decides"
            assert (one["label"], one["score"]) == (one["fg"]["label"], one["fg"]["score"]) and one["fg"]["label"] == o["fg"][
                "label"
            ]
        else:
            assert one["label"] == o["label"] and one["score"] == pytest.approx(o["score"], abs=1e-5) and "full" in one
    with_threshold(run, 60, threshold / 2)  # another fit: the file is not continued with its threshold
    assert "made with" in sentence(l2r2(*test, "--cascade", 60, "-o", tmp_path / "cascade.json"))


def test_what_was_not_fitted_is_refused(fitted, tmp_path, l2r2):
    run, data = fitted
    out = ("-o", tmp_path / "x.json")
    assert "a loss of 60 points only; run `l2r2 fuse RUN DATA --cascade 0.2`" in sentence(
        l2r2("predict", run, data, "--cascade", 0.2, *out)
    )
    plain_run = write_run(tmp_path / "unfitted")
    assert "has no fitted cascade" in sentence(l2r2("predict", plain_run, data, "--cascade", 0.2, *out))
    for wrong in (0, -1, 100):
        assert "percentage points" in sentence(l2r2("fuse", run, data, "--cascade", wrong))
    with pytest.raises(L2R2Error, match="got True"):
        Predictor.from_pretrained(run, cascade=True)
    abstaining = replace(Predictor.from_pretrained(run, device="cpu").rules, abstain=0.5)
    with pytest.raises(L2R2Error, match="fitted on fused predictions"):
        Predictor.from_pretrained(run, device="cpu", cascade=60).with_rules(abstaining)
    Predictor.from_pretrained(run, device="cpu", cascade=0).with_rules(abstaining)
    assert "needs a full branch" in sentence(
        l2r2("fuse", write_run(tmp_path / "bg", branches=("fg", "bg")), data, "--cascade", 5)
    )
