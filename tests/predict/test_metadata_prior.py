"""Metadata priors from the fit to predict and evaluate."""

import json

import pytest
import torch
from conftest import COLORS
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import L2R2Error
from l2r2_models.evaluate.evaluator import judge_run
from l2r2_models.evaluate.fit_prior import fit_prior
from l2r2_models.fusion.prior_file import read_prior

CLASSES = sorted(COLORS)


@pytest.fixture
def data(dataset):
    """The data set with the columns site, which nearly gives the class away, and month."""
    lines = (dataset / "metadata.csv").read_text().splitlines()
    place = lines[0].split(",").index("label")
    made = [f"{lines[0]},site,month"]
    for i, line in enumerate(lines[1:]):
        made.append(f"{line},{'s' if i % 7 else ''}{line.split(',')[place] if i % 7 else ''},{1 + i % 12}")
    (dataset / "metadata.csv").write_text("\n".join(made) + "\n")
    return dataset


def command(*arguments):
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == 0, found.output + str(found.exception)
    return found.output


def objects(file):
    return {image["file"].rsplit("/", 1)[-1]: image["objects"][0] for image in json.loads(file.read_text())["images"]}


def test_predictions_follow_the_metadata_of_the_data_set_or_of_a_csv(run, data, tmp_path):
    prior, plain, corrected = tmp_path / "prior.json", tmp_path / "plain.json", tmp_path / "corrected.json"
    output = command("prior", "fit", data, "--columns", "site,month:12", "-o", prior)
    assert "<- chosen" in output and "wrote" in output
    command("predict", run, data, "--split", "test", "-o", plain, "--top", len(CLASSES))
    command("predict", run, data, "--split", "test", "-o", corrected, "--top", len(CLASSES), "--prior", prior)
    rows = {row.path.name: dict(row.columns) for row in judge_run(run, data, "test").data.table.rows}
    fitted, changed = read_prior(prior, CLASSES), 0
    for name, found in objects(corrected).items():
        scores = {one["label"]: one["score"] for one in objects(plain)[name]["top"]}
        before = torch.tensor([[scores[label] for label in CLASSES]])
        expected = fitted(before.log(), [rows[name]]).exp()[0]
        got = {one["label"]: one["score"] for one in found["top"]}
        torch.testing.assert_close(torch.tensor([got[label] for label in CLASSES]), expected, atol=1e-4, rtol=1e-3)
        assert found["fg"] == objects(plain)[name]["fg"]  # the branches are what the network sees
        assert f"corrected for {'site ' + rows[name]['site'] + ', ' if rows[name]['site'] else ''}month" in found["reason"]
        changed += found["label"] != objects(plain)[name]["label"]
    assert changed
    name, row = next((name, row) for name, row in rows.items() if row["site"])
    image = next(data.rglob(name))
    (tmp_path / "alone.csv").write_text(f"file_name,site\nelsewhere/{name},{row['site']}\n".replace("elsewhere/", ""))
    alone = tmp_path / "alone.json"
    command("predict", run, image, "-o", alone, "--prior", prior, "--metadata", tmp_path / "alone.csv")
    assert f"corrected for site {row['site']}" in objects(alone)[name]["reason"]
    (tmp_path / "alone.csv").write_text(f"file_name,site\n{name},other\n")  # another value: predicted again
    command("predict", run, image, "-o", alone, "--prior", prior, "--metadata", tmp_path / "alone.csv")
    assert "corrected for site other" in objects(alone)[name]["reason"]


def test_evaluate_corrects_full_fg_and_the_fusion(run, data, tmp_path):
    fit_prior(data, ["site"], tmp_path / "prior.json")
    judged = judge_run(run, data, "test", prior=str(tmp_path / "prior.json"))
    fitted = read_prior(tmp_path / "prior.json", judged.labels)
    rows = [dict(row.columns) for row in judged.data.table.rows]
    for name in judged.own:
        torch.testing.assert_close(judged.outputs[f"{name} + prior"], fitted(judged.outputs[name], rows))
    right = (judged.outputs["fg + prior"].argmax(-1) == judged.data.labels).float().mean()
    assert right > 0.5  # a random network, but the site nearly gives the class away


def test_what_the_prior_does_not_go_with_is_refused(run, data, tmp_path):
    prior = tmp_path / "prior.json"
    fit_prior(data, ["site"], prior)
    refusals = (
        ((run, data, "--store-logits"), "cannot be combined"),
        ((run, data, "--image-rule", "full"), "with a rollup, a prior or abstaining"),
        (
            (
                run,
                next(data.rglob("*.png")),
            ),
            "no image has a value of site",
        ),
    )
    for arguments, message in refusals:
        found = CliRunner().invoke(app, ["predict", *map(str, arguments), "-o", str(tmp_path / "p.json"), "--prior", str(prior)])
        assert found.exit_code == 1 and message in str(found.exception)
    with pytest.raises(L2R2Error, match='no column "place"'):
        fit_prior(data, ["place"], prior)
    with pytest.raises(L2R2Error, match="both to count and to choose"):
        fit_prior(data, ["site"], prior, split="train", val_split="train")
