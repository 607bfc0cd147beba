"""The confidence below which predictions are withheld: fitted for a stated risk, stored in the run, used by predict."""

import json

import pytest
import torch
from conftest import sentence, write_dataset, write_run

from l2r2_models import L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.evaluate.risk import fit_abstention, risk_coverage


def test_the_curve_counts_as_a_loop_does():
    generator = torch.Generator().manual_seed(0)
    sure, right = torch.rand(200, generator=generator).mul(20).round() / 20, torch.rand(200, generator=generator) < 0.7
    for threshold, count, errors in zip(*(values.tolist() for values in risk_coverage(sure, right))):
        kept = [bool(r) for s, r in zip(sure.tolist(), right.tolist()) if s >= threshold]
        assert (len(kept), kept.count(False)) == (count, errors)


def logits_of(confidence, right):
    """Two classes; class 1 is true, and predicted where `right`."""
    z = torch.zeros(len(confidence), 2)
    z[torch.arange(len(confidence)), torch.as_tensor(right).long()] = torch.logit(torch.as_tensor(confidence, dtype=torch.float))
    return z, torch.ones(len(confidence), dtype=torch.long)


def test_the_lowest_threshold_with_the_stated_risk_is_found():
    sure = [0.99 - 0.004 * i for i in range(100)]
    found = fit_abstention(*logits_of(sure, [i < 90 for i in range(100)]), 0.05)
    assert found.coverage == 0.93 and found.reached == pytest.approx(3 / 93)  # (3 + 1) / (93 + 1) <= 5 % < (4 + 1) / (94 + 1)
    assert found.threshold == pytest.approx(sure[92], abs=1e-6)
    assert fit_abstention(*logits_of(sure, [True] * 100), 0.05).coverage == 1
    with pytest.raises(L2R2Error, match=r"these 10 images; the lowest is 0\.091"):
        fit_abstention(*logits_of(sure[:10], [True] * 10), 0.05)  # ten correct images do not show 5 %
    with pytest.raises(L2R2Error, match="between 0 and 1"):
        fit_abstention(*logits_of(sure, [True] * 100), 5)


def objects_of(path):
    return [o for image in json.loads(path.read_text())["images"] for o in image["objects"]]


def test_what_fuse_stores_is_what_predict_uses(tmp_path, l2r2):
    data, run = write_dataset(tmp_path / "data", splits=("val", "test")), write_run(tmp_path / "run")
    test = ("predict", run, data, "--split", "test")
    assert "has no threshold to abstain" in sentence(l2r2(*test, "--abstain", "0.9", "-o", tmp_path / "x.json"))
    said = sentence(l2r2("fuse", run, data, "--val-backgrounds", "plain", "--method", "average", "--abstain-risk", "0.001"))
    assert "No confidence threshold reaches a risk of 0.001" in said and "fusion_fit" not in load_checkpoint(run).training
    fit = l2r2("fuse", run, data, "--val-backgrounds", "plain", "--method", "average", "--abstain-risk", "0.9")
    assert fit.returncode == 0 and "abstains below a confidence of" in fit.stdout
    stored = load_checkpoint(run).training["fusion_fit"]["abstain"]
    assert stored["risk"] == 0.9 and stored["images"] == 12 and 0 < stored["coverage"] <= 1
    assert l2r2(*test, "-o", tmp_path / "plain.json").returncode == 0
    plain = objects_of(tmp_path / "plain.json")
    threshold = sorted(o["score"] for o in plain)[6]  # so that some predictions are withheld
    config = json.loads((run / "config.json").read_text())
    config["l2r2"]["training"]["fusion_fit"]["abstain"]["threshold"] = threshold
    (run / "config.json").write_text(json.dumps(config))
    result = l2r2(*test, "--abstain", "0.9", "-o", tmp_path / "out.json")
    out, withheld = objects_of(tmp_path / "out.json"), [o["score"] < threshold for o in plain]
    assert any(withheld) and not all(withheld) and f"{sum(withheld)} unknown" in result.stdout
    for o, r, below in zip(plain, out, withheld):
        assert (r["label"], r["source"]) == (("unknown", "abstained") if below else (o["label"], o["source"]))
        assert r["top"] == o["top"] and r["score"] == o["score"]
    assert "a risk of 0.9 only" in sentence(l2r2(*test, "--abstain", "0.05", "-o", tmp_path / "x.json"))
    (tmp_path / "t.csv").write_text("class,all\nred,x\ngreen,x\nblue,x\n")
    both = ("--abstain", "0.9", "--taxonomy", tmp_path / "t.csv", "--rollup", "0.6")
    assert "use one or the other" in sentence(l2r2(*test, *both, "-o", tmp_path / "x.json"))
    assert l2r2(*test, "--abstain", "0.9", "--store-logits", "-o", tmp_path / "logits.json").returncode == 0
    again = l2r2("fuse", "--predictions", tmp_path / "logits.json", "--method", "average", "-o", tmp_path / "x.json")
    assert "predict without it" in sentence(again)
