"""Explanations are those of the predictions that are shown: of the possible classes, of a group, and corrected by a prior."""

import json
from dataclasses import replace

import pytest
import torch
from audit_cases import GROUNDS, OBJECTS, write_data
from explain_cases import spots, write_spots
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import Explainer, L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.fusion import MetadataPrior
from l2r2_models.fusion.prior_file import write_prior
from l2r2_models.predict.rules import ImagePrior, Rules

BOX = [10, 6, 26, 22]
LABELS = tuple(OBJECTS)  # red, green, blue
GROUPS = {"red": ("warm",), "green": ("cold",), "blue": ("cold",)}


def scene(ground="red"):
    """A red square on a ground: fg sees red, and full the class of the ground."""
    pixels = torch.empty(40, 60, 3, dtype=torch.uint8)
    pixels[:] = torch.tensor(GROUNDS[ground], dtype=torch.uint8)
    x0, y0, x1, y1 = BOX
    pixels[y0:y1, x0:x1] = torch.tensor(OBJECTS["red"], dtype=torch.uint8)
    return pixels


def favors(label, count=60):
    """A prior for the site `a`, at which this class is frequent."""
    truth = [*LABELS, *[label] * count, *[other for other in LABELS if other != label] * (count // 2)]
    sites = [{"site": "b"}] * 3 + [{"site": "a"}] * count + [{"site": "b"}] * count
    prior = MetadataPrior.of_rows(LABELS, truth, sites, ["site"], smoothing=0.01)
    return ImagePrior(prior, {"photo": {"site": "a"}}, "")


def explained(tmp_path, rules, model=None, **options):
    save_checkpoint(model or spots(), tmp_path / "run", list(LABELS))
    explain = Explainer(load_checkpoint(tmp_path / "run"), **options)
    return explain.with_rules(replace(rules, labels=LABELS))(scene(), [BOX], name="photo")


@pytest.mark.parametrize("rules", [Rules(LABELS, classes=("green", "blue")), Rules(LABELS, prior=favors("blue"))])
def test_the_map_is_that_of_the_class_that_is_shown(tmp_path, rules):
    plain, found = (explained(tmp_path, one) for one in (Rules(LABELS), rules))
    assert plain.prediction.label == "red" and found.prediction.label != "red"
    shown = {"full": found.prediction.full.label, "fg": found.prediction.fg.label, "fused": found.prediction.label}
    assert found.questions == {answer: f"why {label}" for answer, label in shown.items()}
    unchanged = found.changes[0]
    assert unchanged.name == "original" and unchanged.label == found.prediction.label
    assert unchanged.probability["fused"] == pytest.approx(found.prediction.score, abs=1e-4)
    assert not torch.equal(found.maps["fused"], plain.maps["fused"])


def test_without_rules_nothing_changes(tmp_path):
    found = explained(tmp_path, Rules(LABELS))
    plain = Explainer(load_checkpoint(tmp_path / "run"))(scene(), [BOX], name="photo")
    assert found.to_dict() == plain.to_dict() and all(torch.equal(found.maps[a], plain.maps[a]) for a in plain.maps)


def test_a_group_is_explained_as_its_classes(tmp_path):
    rules = Rules(LABELS, classes=("green", "blue"), ancestors=GROUPS, rollup=0.999)
    found = explained(tmp_path, rules)
    assert (found.prediction.label, found.prediction.source) == ("cold", "rollup")
    assert found.questions["fused"] == "why green or blue" and found.questions["fg"] in ("why green", "why blue")
    assert found.changes[0].probability["fused"] == pytest.approx(1.0)


def test_a_group_is_explained_without_its_impossible_classes(tmp_path):
    rules = Rules(LABELS, classes=("red", "green"), ancestors=dict.fromkeys(LABELS, ("any",)), rollup=0.9999)
    found = explained(tmp_path, rules)
    assert (found.prediction.label, found.prediction.source) == ("any", "rollup")
    assert found.questions["fused"] == "why red or green"


def test_the_runner_up_is_a_possible_class(tmp_path):
    found = explained(tmp_path, Rules(LABELS, classes=("red", "blue")), against="runner-up")
    assert found.questions["fused"] == "why red and not blue"
    assert explained(tmp_path, Rules(LABELS, classes=("red",)), against="runner-up").questions["fused"] == "why red"


def test_a_prior_corrects_a_plain_classifier_too(tmp_path):
    found = explained(tmp_path, Rules(LABELS, prior=favors("blue")), spots(branches=("full",)))
    assert found.prediction.label == "blue" and found.questions == {"full": "why red", "fused": "why blue"}
    assert found.changes[0].label == "blue"
    assert found.changes[0].probability["fused"] == pytest.approx(found.prediction.score, abs=1e-4)


@pytest.mark.parametrize("options", [{"target": ["red"]}, {"against": "red"}])
def test_a_class_that_is_not_possible_cannot_be_asked_for(tmp_path, options):
    with pytest.raises(L2R2Error, match='"red" is not among the possible ones'):
        explained(tmp_path, Rules(LABELS, classes=("green", "blue")), **options)


def test_the_options_of_the_command(tmp_path):
    run, data = write_spots(tmp_path / "run"), write_data(tmp_path / "data", 3)
    write_prior(tmp_path / "prior.json", favors("blue").prior, {})
    (tmp_path / "fence.csv").write_text("class,region\nred,Alps\ngreen,Tatra\n")
    (tmp_path / "sites.csv").write_text("file_name,site\n000.png,a\n")

    def labels(*options):
        command = ["explain", run, data / "images" / "000.png", "-o", tmp_path / "p.html", "--json", "--no-numbers", *options]
        result = CliRunner().invoke(app, [*map(str, command)])
        assert result.exit_code == 0, result.output + str(result.exception)
        record = json.loads(result.stdout.splitlines()[0])
        assert record["questions"]["fused"] == f"why {record['objects'][0]['label']}"
        return record["objects"][0]["label"]

    assert labels() == "red"
    assert labels("--classes", "green") == "green"
    assert labels("--geofence", tmp_path / "fence.csv", "--region", "Tatra") in ("green", "blue")
    assert labels("--prior", tmp_path / "prior.json", "--metadata", tmp_path / "sites.csv") == "blue"
    alone = ["explain", run, data, "-o", tmp_path / "p.html", "--metadata", tmp_path / "sites.csv"]
    assert CliRunner().invoke(app, [*map(str, alone)]).exit_code == 2
