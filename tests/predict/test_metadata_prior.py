"""Metadata priors from the fit to predict and evaluate."""

import json

import pytest
import torch
from conftest import COLORS
from PIL import Image
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import L2R2Error
from l2r2_models.evaluate.evaluator import judge_run
from l2r2_models.evaluate.fit_prior import fit_prior
from l2r2_models.fusion.prior_file import read_prior
from l2r2_models.predict.inputs import gather

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
        new = found["label"] != objects(plain)[name]["label"]
        how = f"{'changed' if new else 'corrected'} by the prior for "
        known = f"{'site ' + rows[name]['site'] + ', ' if rows[name]['site'] else ''}month"
        assert found["reason"].startswith(f"{objects(plain)[name]['reason']}; {how}{known}")
        changed += new
    assert changed
    name, row = next((name, row) for name, row in rows.items() if row["site"])
    image = next(data.rglob(name))
    (tmp_path / "alone.csv").write_text(f"file_name,site\nelsewhere/{name},{row['site']}\n".replace("elsewhere/", ""))
    alone = tmp_path / "alone.json"
    command("predict", run, image, "-o", alone, "--prior", prior, "--metadata", tmp_path / "alone.csv")
    assert f"by the prior for site {row['site']}" in objects(alone)[name]["reason"]
    (tmp_path / "alone.csv").write_text(f"file_name,site\n{name},other\n")  # another value: predicted again
    command("predict", run, image, "-o", alone, "--prior", prior, "--metadata", tmp_path / "alone.csv")
    assert "by the prior for site other" in objects(alone)[name]["reason"]


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


def test_a_row_that_fits_several_images_or_contradicts_another_is_refused(run, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "1.png")
    table = tmp_path / "m.csv"
    inputs = gather([tmp_path / "a", tmp_path / "b"])
    table.write_text("file_name,site\n1.png,hill\n")
    with pytest.raises(L2R2Error, match=r"one entry matches both .*a/1\.png and .*b/1\.png; use longer paths"):
        inputs.with_columns(table)
    table.write_text("file_name,site\na/1.png,hill\na/1.png,dale\n")
    with pytest.raises(L2R2Error, match=r"two different rows for a/1\.png"):
        inputs.with_columns(table)
    table.write_text("file_name,site\na/1.png,hill\nb/1.png,dale\n")
    out = tmp_path / "p.csv"
    command("predict", run, tmp_path / "a", tmp_path / "b", "-o", out, "--group", "site", "--metadata", table)
    assert out.read_text().splitlines()[0].count("group") and "hill" in out.read_text() and "dale" in out.read_text()
    found = CliRunner().invoke(
        app, ["predict", str(run), str(tmp_path / "a"), "-o", str(tmp_path / "q.json"), "--group", "folder", "--format", "coco"]
    )
    assert found.exit_code == 1 and "has no place for --group" in str(found.exception)
