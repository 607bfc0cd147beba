"""Restricted classes, regions and groups: independent references, and names that do not exist."""

import json

import pytest
import torch
from conftest import sentence, write_dataset, write_run

from l2r2_models import L2R2Error, Predictor
from l2r2_models.predict.fuse_again import fuse_again
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.predict.rule_files import read_rules
from l2r2_models.predict.rules import Rules

CATS = {
    "lion": ("Panthera", "Felidae"),
    "leopard": ("Panthera", "Felidae"),
    "lynx": ("Lynx", "Felidae"),
    "wolf": ("Canis", "Canidae"),
    "stone": ("", ""),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    data = write_dataset(folder / "data", splits=("test",))
    rows = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([*rows[:4], rows[4].split(",test")[0] + ",test,,,,", *rows[5:]]))
    return write_run(folder / "run"), data


def objects_of(out):
    return [o for image in json.loads(out.read_text())["images"] for o in image["objects"]]


def test_restricted_probabilities_are_renormalized_in_every_branch(made, tmp_path, l2r2):
    run, data = made
    (tmp_path / "names.txt").write_text("red\n\nblue\n")
    for out, options in (("all", ()), ("names", ("--classes", "red, blue")), ("file", ("--classes", tmp_path / "names.txt"))):
        assert l2r2("predict", run, data, "-o", tmp_path / f"{out}.json", "--top", "3", *options).returncode == 0
    every, some = (objects_of(tmp_path / f"{name}.json") for name in ("all", "names"))
    assert some == objects_of(tmp_path / "file.json") and {o["source"] for o in some} == {"full", "fused"}
    for o, r in zip(every, some):
        p = {one["label"]: one["score"] for one in o["top"]}
        expected = {label: p[label] / (p["red"] + p["blue"]) for label in ("red", "blue")}
        found = {one["label"]: one["score"] for one in r["top"]}
        assert found == pytest.approx(expected, abs=1e-4) and r["label"] == max(expected, key=expected.get)
        assert {r[b]["label"] for b in ("full", "fg") if b in r} <= {"red", "blue"}
        if o["full"]["label"] != "green":
            assert r["full"]["label"] == o["full"]["label"] and r["full"]["score"] > o["full"]["score"]


def test_only_classes_of_the_region_are_possible(made, tmp_path):
    labels = ("blue", "green", "red")
    fence = tmp_path / "fence.csv"
    fence.write_text("region,class\nAlps,red\nTatra,red\nTatra,green\n")
    assert read_rules(labels, geofence=fence, region="Alps").classes == ("blue", "red")  # blue has no row: everywhere
    assert read_rules(labels, geofence=fence, region="Tatra").classes == labels
    assert read_rules(labels, geofence=fence, region="Alps", classes="red,green").classes == ("red",)
    with pytest.raises(L2R2Error, match='unknown region "Alp"; did you mean Alps'):
        read_rules(labels, geofence=fence, region="Alp")
    with pytest.raises(L2R2Error, match="No class of the model is left"):
        read_rules(labels, geofence=fence, region="Alps", classes="green")


@pytest.mark.parametrize(
    ("p", "rollup", "expected"),
    [
        ((0.5, 0.3, 0.1, 0.05, 0.05), 0.65, ("Panthera", 0.8)),
        ((0.5, 0.1, 0.3, 0.05, 0.05), 0.65, ("Felidae", 0.9)),  # no genus reaches it
        ((0.1, 0.1, 0.1, 0.6, 0.1), 0.65, ("unknown", 0.0)),  # neither family does
        ((0.1, 0.1, 0.1, 0.1, 0.6), 0.65, ("unknown", 0.0)),  # a class without groups is in none
        ((0.5, 0.125, 0.125, 0.25, 0.0), 0.75, ("Felidae", 0.75)),  # reaching is enough
    ],
)
def test_the_narrowest_group_that_reaches_the_probability(p, rollup, expected):
    name, score = Rules(tuple(CATS), ancestors=CATS, rollup=rollup).group(torch.tensor(p, dtype=torch.float64))
    assert name == expected[0] and score == pytest.approx(expected[1])


def test_rolled_up_predictions_say_so_in_every_format(made, tmp_path, l2r2):
    run, data = made
    (tmp_path / "t.csv").write_text("class,warmth\nred,warm\ngreen,cold\nblue,cold\nmauve,warm\n")  # more classes than the model
    plain, out = tmp_path / "plain.json", tmp_path / "out.json"
    assert l2r2("predict", run, data, "-o", plain).returncode == 0
    result = l2r2("predict", run, data, "--taxonomy", tmp_path / "t.csv", "--rollup", "0.6", "-o", out)
    assert result.returncode == 0 and "rolled up to a group" in result.stdout
    for o, r in zip(objects_of(plain), objects_of(out)):
        p = {one["label"]: one["score"] for one in o["top"]}
        assert r["top"] == o["top"] and r["reason"].startswith(o["reason"]) and max(p.values()) < 0.6
        cold = p["blue"] + p["green"]
        if cold >= 0.6:
            assert (r["label"], r["source"]) == ("cold", "rollup") and r["score"] == pytest.approx(cold, abs=2e-6)
        else:
            assert (r["label"], r["source"], r["score"]) == ("unknown", "abstained", max(p.values()))
    assert {r["source"] for r in objects_of(out)} >= {"rollup"}
    rules = read_rules(("blue", "green", "red"), taxonomy=tmp_path / "t.csv", rollup=0.6)
    predictor = Predictor.from_pretrained(run, device="cpu").with_rules(rules)
    predict_to_file(predictor, gather([data]), tmp_path / "md.json", format="megadetector")
    data_of = json.loads((tmp_path / "md.json").read_text())
    first = data_of["images"][0]["detections"][0]["classifications"]
    assert data_of["classification_categories"][first[0][0]] == objects_of(out)[0]["label"]
    assert [score for _, score in first] == sorted((score for _, score in first), reverse=True)


def test_rules_hold_when_logits_are_fused_again(made, tmp_path):
    run, data = made
    (tmp_path / "t.csv").write_text("class,warmth\nred,warm\ngreen,cold\nblue,cold\n")
    rules = read_rules(("blue", "green", "red"), classes="red,blue", taxonomy=tmp_path / "t.csv", rollup=0.52)
    predictor = Predictor.from_pretrained(run, device="cpu").with_rules(rules)
    predict_to_file(predictor, gather([data]), tmp_path / "logits.json", store_logits=True)
    fuse_again(tmp_path / "logits.json", tmp_path / "again.json", run=str(run))
    stored = [{k: v for k, v in o.items() if k != "logits"} for o in objects_of(tmp_path / "logits.json")]
    assert stored == objects_of(tmp_path / "again.json")
    with pytest.raises(L2R2Error, match="made with a different settings"):
        plain = Predictor.from_pretrained(run, device="cpu")
        predict_to_file(plain, gather([data]), tmp_path / "logits.json", store_logits=True)


def test_unknown_names_and_lone_options_are_sentences(made, tmp_path, l2r2):
    run, data = made
    (tmp_path / "t.csv").write_text("class,warmth\nread,warm\ngreen,cold\nblue,cold\n")
    (tmp_path / "one.csv").write_text("class\nred\n")
    (tmp_path / "fence.csv").write_text("class,place\nred,Alps\n")

    def said(*options):
        return sentence(l2r2("predict", run, data, "-o", tmp_path / "x.json", *options))

    assert 'unknown class "gren"; did you mean green?' in said("--classes", "red,gren")
    assert 'unknown class "zzz"; there are 3, e.g. blue, green, red.' in said("--classes", "zzz")
    assert "has no row for the class red; did you mean read?" in said("--taxonomy", tmp_path / "t.csv", "--rollup", "0.6")
    assert "has one column" in said("--taxonomy", tmp_path / "one.csv", "--rollup", "0.6")
    assert "need each other" in said("--taxonomy", tmp_path / "t.csv") and "need each other" in said("--region", "Alps")
    assert "probability above 0" in said("--taxonomy", tmp_path / "t.csv", "--rollup", "65")
    assert "needs the columns class and region" in said("--geofence", tmp_path / "fence.csv", "--region", "Alps")
    assert "cannot be read" in said("--geofence", tmp_path / "none.csv", "--region", "Alps")


def test_rules_that_a_prediction_would_not_follow_are_refused(made, tmp_path):
    run, data = made
    withhold = Rules(("red", "green", "blue"), abstain=0.5)
    with pytest.raises(L2R2Error, match='The image rule "weighted" names a class'):
        Predictor.from_pretrained(run, image_rule="weighted").with_rules(withhold)
    with pytest.raises(L2R2Error, match="was fitted without --adapt"):
        predictor = Predictor.from_pretrained(run).with_rules(withhold)
        predict_to_file(predictor, gather([data]), tmp_path / "out.json", adapt="folder")
    assert not (tmp_path / "out.json").exists()
