"""iFAM in a run: trained from labels alone, resumed, used for prediction, published."""

import json

import pytest
import torch
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import IFAM, L2R2Error, Predictor
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from conftest import write_dataset

    folder = tmp_path_factory.mktemp("ifam")
    data = write_dataset(folder / "data", splits=("train", "test"))
    (data / "metadata.csv").write_text(  # no boxes at all
        "\n".join(",".join(line.split(",")[:3]) for line in (data / "metadata.csv").read_text().splitlines())
    )
    recipe = Recipe.default(
        "ifam_vit_tiny_patch16_224",
        False,
        size=32,
        num_parts=3,
        epochs=2,
        batch_size=6,
        part_background=0.5,
        lr=1e-4,
        backbone={"patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3},
    )
    finetune(data, recipe, folder / "run")
    return folder / "run", data, recipe


def test_finetune_needs_images_and_labels_only(run):
    folder, data, _ = run
    model = load_checkpoint(folder).model
    assert isinstance(model, IFAM) and model.parts.num_parts == 3 and model.parts.quantiles.any()
    assert model.fusion.config() == {"name": "robust", "threshold": 0.0}
    prediction = Predictor.from_pretrained(folder)(next((data / "images").glob("test*")))
    assert len(prediction.objects) == 1 and prediction.objects[0].box is None


def test_an_interrupted_run_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    from l2r2_models.train import trainer

    folder, data, recipe = run
    saved = []

    class Killed(Exception):
        pass

    save = trainer.BranchTrainer._save_checkpoint

    def killed(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(1)
        raise Killed

    monkeypatch.setattr(trainer.BranchTrainer, "_save_checkpoint", killed)
    with pytest.raises(Killed):
        finetune(data, recipe, tmp_path / "run")
    monkeypatch.undo()
    finetune(data, recipe, tmp_path / "run")
    whole, continued = (load_checkpoint(f).model.state_dict() for f in (folder, tmp_path / "run"))
    assert saved and all(torch.equal(whole[k], continued[k]) for k in whole)


def test_evaluate_under_interventions(run):
    folder, data, _ = run
    call = CliRunner().invoke

    def judged(*options):
        result = call(app, ["evaluate", str(folder), str(data), "--json", *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plain, without = judged(), judged("--drop-parts", "0,1")
    assert plain["notes"] == [] and "without the parts 0, 1." in without["notes"][0]
    assert without["with_object"] <= plain["with_object"] and plain["images"] == without["images"]
    assert judged("--token-quantile", "1.0")["with_object"] <= plain["with_object"]
    assert judged()["with_object"] == plain["with_object"]  # the stored logits are those of the untouched network
    for options, message in (
        (["--drop-parts", "7"], "no part 7"),
        (["--drop-parts", "0,1,2"], "All 3 parts"),
        (["--token-quantile", "2"], "between 0 and 1"),
    ):
        result = call(app, ["evaluate", str(folder), str(data), *options])
        assert result.exit_code == 1 and message in str(result.exception)


def test_predict_says_that_boxes_are_not_used(run, tmp_path):
    folder, data, _ = run
    image = next((data / "images").glob("test*"))
    (tmp_path / "boxes.json").write_text(json.dumps({image.name: [[0, 0, 9, 9]]}))
    options = ["--boxes", str(tmp_path / "boxes.json"), "-o", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, ["predict", str(folder), str(image), *options])
    assert result.exit_code == 0 and "finds its object itself; boxes and masks are not used" in result.stderr


def test_interventions_belong_to_ifam(dataset):
    from conftest import write_run

    run = write_run(dataset.parent / "run")
    result = CliRunner().invoke(app, ["evaluate", str(run), str(dataset), "--drop-parts", "0"])
    assert result.exit_code == 1 and "iFAM" in str(result.exception)


def test_num_parts_belongs_to_ifam(tmp_path, dataset):
    with pytest.raises(L2R2Error, match="num_parts"):
        finetune(dataset, Recipe.default("timm:resnet10t", False, size=32, num_parts=3), tmp_path / "run")


def test_branch_logits_of_an_intervened_model_have_their_own_store(run, tmp_path):
    folder, data, _ = run
    checkpoint, test = load_checkpoint(folder), read_table(data).of_split("test")
    before = branch_logits(checkpoint, test, tmp_path)
    with checkpoint.model.intervened(drop_parts=[0, 1]):
        inside = branch_logits(checkpoint, test, tmp_path)
    after = branch_logits(checkpoint, test, tmp_path)
    assert not torch.equal(before.logits["full"], inside.logits["full"])
    assert torch.equal(before.logits["full"], after.logits["full"])
