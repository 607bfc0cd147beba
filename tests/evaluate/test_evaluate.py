"""Stored logits, fitted fusions in a run, and the metrics."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset, write_run
from sklearn.metrics import balanced_accuracy_score

from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.table import ImageTable, Row, read_table
from l2r2_models.evaluate.evaluator import evaluate_run
from l2r2_models.evaluate.fit_run import fit_run, rows_of
from l2r2_models.evaluate.fuse import fit
from l2r2_models.evaluate.logits import BranchLogits, branch_logits
from l2r2_models.evaluate.metrics import by_group, macro_accuracy, oracle
from l2r2_models.fusion import FUSIONS
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import accuracy_by_branch, predict_to_file
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe


@pytest.fixture
def own_run(tmp_path):
    return write_run(tmp_path / "run")


def test_logits_are_those_of_the_model_and_are_computed_once(own_run, dataset):
    checkpoint, table = hub.load_checkpoint(own_run), read_table(dataset).of_split("val")
    passes = []
    count = lambda batches, total: passes.append(total) or batches  # noqa: E731
    first = branch_logits(checkpoint, table, own_run / "logits", batch_size=5, progress=count)
    second = branch_logits(checkpoint, table, own_run / "logits", progress=count)
    assert passes == [3]
    assert all(torch.equal(first.logits[b], second.logits[b]) for b in ("full", "fg")) and second.has_fg.all()
    entries = {str(row.path): row.entry for row in table.rows}
    answers = Predictor(checkpoint, device="cpu").predict_files([row.path for row in table.rows], entries)
    assert [checkpoint.labels[i] for i in first.logits["fg"].argmax(-1)] == [a.objects[0].fg.label for a in answers]


def test_other_boxes_or_other_weights_never_reuse_stored_logits(own_run, dataset, tmp_path):
    checkpoint, store = hub.load_checkpoint(own_run), own_run / "logits"
    table = read_table(dataset).of_split("val")
    branch_logits(checkpoint, table, store)
    text = (dataset / "metadata.csv").read_text()
    (dataset / "metadata.csv").write_text(text.replace(",val,", ",val,1", 1))
    branch_logits(checkpoint, read_table(dataset).of_split("val"), store)
    branch_logits(hub.load_checkpoint(write_run(tmp_path / "other", seed=1)), table, store)
    assert len(list(store.iterdir())) == 3
    checkpoint.model.fusion.threshold.fill_(0.9)  # another fusion does not change what the branches say
    branch_logits(checkpoint, table, store)
    assert len(list(store.iterdir())) == 3


def test_anything_that_changes_the_logits_is_computed_again(own_run, dataset, tmp_path):
    """Scores under the threshold, an image replaced by one of the same size, labels in another order, a damaged store."""
    checkpoint, store = hub.load_checkpoint(own_run), own_run / "logits"
    for score in (0.9, 0.1):
        (tmp_path / "boxes.json").write_text(
            json.dumps(
                {
                    "info": {},
                    "detection_categories": {},
                    "images": [
                        {
                            "file": f"val_{i:03d}.png",
                            "detections": [{"category": "1", "conf": score, "bbox": [0.1, 0.1, 0.5, 0.5]}],
                        }
                        for i in range(12)
                    ],
                }
            )
        )
        table = read_table(dataset, boxes=tmp_path / "boxes.json").of_split("val")
        assert branch_logits(checkpoint, table, store).has_fg.all() == (score > 0.2)
    table = read_table(dataset).of_split("val")
    before = branch_logits(checkpoint, table, store)
    path = table.rows[0].path
    path.write_bytes(table.rows[1].path.read_bytes()[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))
    after = branch_logits(checkpoint, read_table(dataset).of_split("val"), store)
    assert not torch.equal(before.logits["full"][0], after.logits["full"][0])
    for file in store.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(branch_logits(checkpoint, read_table(dataset).of_split("val"), store).logits["full"], after.logits["full"])


def test_a_store_that_cannot_be_written_does_not_stop_the_evaluation(own_run, dataset):
    (own_run / "logits").write_text("in the way")
    assert evaluate_run(own_run, dataset, "val").images == 12


def test_weights_and_config_of_different_saves_are_refused_and_fixed_by_fitting(own_run, dataset):
    weights = (own_run / "model.safetensors").read_bytes()
    fit_run(own_run, dataset, "val", method="scaled_average")
    (own_run / "model.safetensors").write_bytes(weights)  # as if killed between the two files
    with pytest.raises(L2R2Error, match="are from different saves; fit the fusion again"):
        Predictor.from_pretrained(own_run)
    fit_run(own_run, dataset, "val", method="robust")
    assert Predictor.from_pretrained(own_run).model.fusion.name == "robust"


def test_predictions_made_before_the_fusion_changed_are_not_kept(own_run, dataset, tmp_path):
    predict_to_file(Predictor.from_pretrained(own_run, device="cpu"), gather([dataset], split="val"), tmp_path / "p.json")
    fit_run(own_run, dataset, "val", method="max_confidence")
    with pytest.raises(L2R2Error, match=r"made with a different .*fusion"):
        predict_to_file(Predictor.from_pretrained(own_run, device="cpu"), gather([dataset], split="val"), tmp_path / "p.json")


def test_without_a_full_branch_evaluate_and_predict_agree(dataset, tmp_path):
    run = write_run(tmp_path / "fgbg", branches=("fg", "bg"), fusion="average")
    (tmp_path / "boxes.json").write_text('{"test_000.png": [[500, 500, 600, 600]]}')
    judged = evaluate_run(run, dataset, "test", boxes=tmp_path / "boxes.json")
    predictor = Predictor.from_pretrained(run, device="cpu")
    rows = read_table(dataset).of_split("test").rows
    right = [p.label == row.label for p, row in zip(predictor.predict_files([row.path for row in rows]), rows)]
    assert judged.rows["fused: average"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert "no object was found in any image" in judged.warnings[0]


def test_a_fitted_fusion_is_saved_and_used_in_every_prediction(own_run, dataset):
    report = fit_run(own_run, dataset, "val", method="scaled_weighted_average")
    assert report.rows == report.with_object == 48  # as they are, and on three other backgrounds each
    assert set(report.numbers) == {"scaled_weighted_average"}
    model = hub.load_checkpoint(own_run).model
    assert model.fusion.name == "scaled_weighted_average" and not torch.equal(model.fusion.temperatures, torch.ones(2, 1))
    config = json.loads((own_run / "config.json").read_text())
    assert config["l2r2"]["training"]["fusion_fit"]["split"] == "val"
    view = torch.randn(2, 3, 32, 32)
    out = model.forward_views(view, view)
    assert torch.equal(out.fused, model.fusion(out.fg, out.full[None]))


@pytest.mark.parametrize("method", sorted(FUSIONS))
def test_every_fusion_survives_the_checkpoint(own_run, dataset, method):
    fit_run(own_run, dataset, "val", method=method, class_wise=True)
    before = hub.load_checkpoint(own_run).model.fusion
    again = hub.load_checkpoint(own_run).model.fusion
    assert before.config() == again.config() and before.config()["name"] == method
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), again.buffers()))


def test_a_dry_run_leaves_the_run_as_it_is(own_run, dataset):
    before = {p.name: p.read_bytes() for p in own_run.iterdir() if p.is_file()}
    fit_run(own_run, dataset, "val", save=False)
    assert before == {p.name: p.read_bytes() for p in own_run.iterdir() if p.is_file()}


def test_fitting_on_training_rows_warns(own_run, dataset):
    table = read_table(dataset)
    (own_run / "run.json").write_text(json.dumps({"train_files": table.of_split("train").names()}))
    assert "12 of the 12 images of train were trained on" in fit_run(own_run, dataset, "train", save=False).warnings[0]
    assert fit_run(own_run, dataset, "val", save=False).warnings == ()
    assert "trained on" in evaluate_run(own_run, dataset, "train").warnings[0]
    fit_run(own_run, dataset, "val")
    assert "used to fit the fusion" in evaluate_run(own_run, dataset, "val").warnings[0]
    assert fit_run(own_run, dataset, "val").warnings == ()  # fitting anew forgets the old numbers
    fit_run(own_run, dataset, "val", method="average")  # nothing was fitted, and nothing chosen
    assert evaluate_run(own_run, dataset, "val").warnings == ()


def test_evaluating_on_rows_that_chose_the_epoch_warns(own_run, dataset):
    record = {"val_files": read_table(dataset).of_split("val").names(), "val_used_for": []}
    (own_run / "run.json").write_text(json.dumps(record))
    assert evaluate_run(own_run, dataset, "val").warnings == ()
    (own_run / "run.json").write_text(json.dumps({**record, "val_used_for": ["best_metric"]}))
    (warning,) = evaluate_run(own_run, dataset, "val").warnings
    assert warning.startswith("12 of the 12 images of val were used to choose the epoch; the metrics are too optimistic")
    assert evaluate_run(own_run, dataset, "test").warnings == fit_run(own_run, dataset, "val").warnings == ()


def test_held_out_images_are_counted_as_images_not_as_rows(own_run, dataset):
    table = read_table(dataset)
    names = table.of_split("train").names()
    unsplit = replace(table, rows=tuple(replace(row, split=None) for row in table.rows))
    (own_run / "run.json").write_text(json.dumps({"val_files": [*names, *names]}))  # two objects an image, when it was trained
    assert len(rows_of(own_run, unsplit, "val")) == 12
    (own_run / "run.json").write_text(json.dumps({"val_files": [*names, "gone.png"]}))
    with pytest.raises(L2R2Error, match=r"1 of the images that .* held out are missing"):
        rows_of(own_run, unsplit, "val")


def test_val_means_the_rows_that_the_run_held_out(tmp_path):
    data = write_dataset(tmp_path / "data", count=60)
    recipe = Recipe.default("timm:resnet10t", False, size=32, epochs=1, val_fraction=0.2)
    result = finetune(data, recipe, tmp_path / "run")
    assert result.images == 48 and set(result.metrics) >= {"fused_accuracy", "full_accuracy", "fg_accuracy"}
    report = fit_run(tmp_path / "run", data, "val", method="average")
    assert report.rows == 48 and not any("trained on" in warning for warning in report.warnings)
    assert evaluate_run(tmp_path / "run", data, "val").rows["full"]["accuracy"] == pytest.approx(result.metrics["full_accuracy"])
    with pytest.raises(L2R2Error, match='no image has the split "test"'):
        evaluate_run(tmp_path / "run", data, "test")


def test_the_choice_is_made_on_unseen_rows(dataset):
    """Branches that know nothing: learning the rows by heart must not look like an advantage."""
    generator = torch.Generator().manual_seed(0)
    logits = {b: torch.randn(60, 10, generator=generator) for b in ("full", "fg")}
    labels = torch.randint(0, 10, (60,), generator=generator)
    rows = tuple(Row(dataset / f"{i}.png") for i in range(60))
    data = BranchLogits(logits, torch.ones(60, dtype=torch.bool), labels, ImageTable(dataset, rows))
    assert set(fit(data)) >= {"robust", "scaled_weighted_average"}  # 1 and 3 numbers
    assert not {"weighted_logits", "concat_mlp"} & set(fit(data))  # 20 and 2000 from 60 images: only when asked for
    fitted = fit(data, sorted(FUSIONS))
    heart = (fitted["concat_mlp"].fusion(logits["fg"], data.logits["full"][None]).argmax(-1) == labels).double().mean()
    assert heart > 0.9 and fitted["concat_mlp"].accuracy < 0.35
    assert all(f.accuracy < 0.35 for f in fitted.values())


def test_fusing_what_cannot_be_fused_is_a_sentence(own_run, dataset, tmp_path):
    with pytest.raises(L2R2Error, match='Unknown fusion "rubust"; choose from best_on_val'):
        fit_run(own_run, dataset, "val", method="rubust")
    with pytest.raises(L2R2Error, match='no image has the split "dev"'):
        fit_run(own_run, dataset, "dev")
    with pytest.raises(L2R2Error, match="no such run"):
        fit_run(tmp_path / "nowhere", dataset, "val")
    with pytest.raises(L2R2Error, match="this one has only full"):
        fit_run(write_run(tmp_path / "plain", branches=("full",)), dataset, "val")
    text = "\n".join(",".join(line.split(",")[:3]) for line in (dataset / "metadata.csv").read_text().splitlines())
    (dataset / "metadata.csv").write_text(text)
    with pytest.raises(L2R2Error, match=r"found in 0 of 12 images.*--boxes"):
        fit_run(own_run, dataset, "val")
    with pytest.raises(L2R2Error, match="has only the branch full, so there is no fusion to fit"):
        evaluate_run(tmp_path / "plain", dataset, "test", fit_split="val")


def test_rows_of_one_class_fit_nothing(own_run, dataset):
    text = (dataset / "metadata.csv").read_text()
    (dataset / "metadata.csv").write_text(text.replace("green,val", "red,val").replace("blue,val", "red,val"))
    with pytest.raises(L2R2Error, match="all have one class"):
        fit_run(own_run, dataset, "val")


def test_evaluate_gives_every_branch_and_fusion_and_agrees_with_predict(own_run, dataset, tmp_path):
    result = evaluate_run(own_run, dataset, "test", group="label", fit_split="val")
    assert {"full", "fg", "fused: robust", *FUSIONS} == set(result.rows)
    predictor = Predictor.from_pretrained(own_run, device="cpu")
    report = predict_to_file(predictor, gather([dataset], split="test"), tmp_path / "p.json")
    truth = {str(r.path): r.label for r in read_table(dataset).rows}
    predicted = accuracy_by_branch(report.images, truth)
    for row, branch in (("full", "full"), ("fg", "fg"), ("fused: robust", "fused")):
        assert result.rows[row]["accuracy"] == pytest.approx(predicted[branch])
    assert result.oracle >= max(result.rows["full"]["accuracy"], result.rows["fg"]["accuracy"])
    figures = result.rows["full"]
    assert figures["worst_group"] == min(figures["by_group"].values()) and set(figures["by_group"]) == {"red", "green", "blue"}
    assert figures["without_box"] is None


def test_metadata_can_correct_the_predictions(own_run, dataset):
    table = read_table(dataset)
    with pytest.raises(L2R2Error, match="contains none of the images"):
        evaluate_run(own_run, dataset, "test", prior="label")
    (own_run / "run.json").write_text(json.dumps({"train_files": table.of_split("train").names()}))
    rows = evaluate_run(own_run, dataset, "test", prior="label").rows  # the label itself as metadata: as good as knowing it
    assert rows["full + label"]["accuracy"] > rows["full"]["accuracy"] and "fused: robust + label" in rows
    relabeled = (dataset / "metadata.csv").read_text().replace("train_000.png,red", "train_000.png,teal")
    (dataset / "teal.csv").write_text(relabeled)
    with pytest.raises(L2R2Error, match=r"train_000\.png: its class teal is unknown to"):
        evaluate_run(own_run, dataset, "test", prior="label", metadata=dataset / "teal.csv")
    same = evaluate_run(own_run, dataset, "test", prior="file_name").rows  # values that training never saw
    assert same["fg + file_name"]["accuracy"] == same["fg"]["accuracy"]


def test_a_split_is_never_used_both_to_fit_and_to_evaluate(own_run, dataset):
    with pytest.raises(L2R2Error, match="cannot be used both to fit and to evaluate"):
        evaluate_run(own_run, dataset, "test", fit_split="test")
    with pytest.raises(L2R2Error, match='no column "weather" in the metadata; there are file_name, label, split'):
        evaluate_run(own_run, dataset, "test", group="weather")


def test_macro_accuracy_counts_the_classes_that_occur_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    answers = torch.where(torch.rand(200, generator=generator) < 0.6, labels, torch.randint(0, 6, (200,), generator=generator))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert macro_accuracy(answers, labels) == pytest.approx(balanced_accuracy_score(labels, answers))


def test_groups_and_oracle():
    labels, answers = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 1])
    assert by_group(answers, labels, ["a", "a", "b", "b"]) == {"a": 1.0, "b": 0.0}
    assert oracle([torch.eye(3)[answers], torch.eye(3)[torch.tensor([2, 2, 2, 2])]], labels) == 0.75


def test_logits_that_are_not_finite_name_an_image(dataset, tmp_path, monkeypatch):
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # one pass
    forward = checkpoint.model.forward_views

    def broken(**views):
        out = forward(**views)
        out.fg[3] = float("nan")
        return out

    monkeypatch.setattr(checkpoint.model, "forward_views", broken)
    with pytest.raises(L2R2Error, match=r"not finite for 1 of 12 images, e\.g\. .*test_003\.png"):
        branch_logits(checkpoint, read_table(dataset).of_split("test"))
