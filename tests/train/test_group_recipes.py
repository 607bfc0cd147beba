"""GroupDRO and group-balanced draws: closed forms, equality with ERM for one group, and runs on grouped images."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset, write_run
from safetensors.torch import load_file
from test_resume import same_weights

from l2r2_models import L2R2Error, load_checkpoint
from l2r2_models.boxes import BoxEntry
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.fuse import fuse
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.train.finetune import finetune
from l2r2_models.train.groups import GroupDRO, count_groups, groups_of
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe
from l2r2_models.train.upweight import FirstStage

DRO = {"objective": "group_dro", "group": "place", "group_step": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with a column `place`: one of four images per class is at sea."""
    root = write_dataset(tmp_path_factory.mktemp("groups") / "data", count=12, splits=("train", "val"))
    rows = list(csv.DictReader((root / "metadata.csv").open()))
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "place"])
        writer.writeheader()
        writer.writerows({**row, "place": "land" if i % 4 else "sea"} for i, row in enumerate(rows))
    return root


def recipe(**changes):
    return Recipe.default("timm:resnet10t", False, **{"size": 32, "epochs": 2, "batch_size": 6, **changes})


def test_the_weights_of_the_groups_follow_exponentiated_gradient_ascent():
    dro, rows = GroupDRO(["full"], 3, 0.3), torch.tensor([True, True, True, False])
    groups, expected = torch.tensor([0, 0, 2, 1]), [1 / 3] * 3
    for losses in (torch.tensor([1.0, 3.0, 5.0, 99.0]), torch.tensor([0.0, 0.5, 0.1, 99.0])):
        means = [(losses[0] + losses[1]).item() / 2, 0.0, losses[2].item()]  # the row of group 1 does not count
        raised = [q * math.exp(0.3 * mean) for q, mean in zip(expected, means)]
        expected = [q / sum(raised) for q in raised]
        loss = dro("full", losses, rows, groups)
        assert dro.full.tolist() == pytest.approx(expected, rel=1e-5)
        assert loss.item() == pytest.approx(sum(q * mean for q, mean in zip(expected, means)), rel=1e-5)


def test_the_gradient_is_that_of_the_weighted_means():
    losses = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    dro = GroupDRO(["fg"], 2, 0.1)
    dro("fg", losses, torch.ones(3, dtype=torch.bool), torch.tensor([0, 0, 1])).backward()
    q = dro.fg.tolist()
    assert losses.grad.tolist() == pytest.approx([q[0] / 2, q[0] / 2, q[1]])


@pytest.mark.parametrize("training", [True, False])
def test_one_group_is_erm(training):
    """And evaluation ignores the groups."""
    torch.manual_seed(0)
    model = create_model(recipe(), 3)
    batch = dict(labels=torch.arange(6) % 3, has_fg=torch.arange(6) > 1, full=torch.randn(6, 3, 32, 32))
    batch["fg"] = torch.randn(6, 3, 32, 32)
    plain = BranchLoss(model, 0.1).train(training)(**batch)["loss"]
    dro = BranchLoss(model, 0.1, dro=GroupDRO(model.branches, 1, 0.5)).train(training)
    assert torch.allclose(dro(**batch, group=torch.zeros(6, dtype=torch.long))["loss"], plain, atol=1e-6)
    if not training:
        assert torch.equal(dro(**batch)["loss"], plain)


def test_groups_are_the_combinations_of_label_and_value(data):
    table = read_table(data)
    groups, counts = groups_of(table, "place"), count_groups(table, "place")
    assert len(counts) == 2 * len(table.classes()) and sum(counts.values()) == len(table)
    names = [f"{row.label} / {dict(row.columns)['place']}" for row in table.rows]
    assert [sorted(counts)[group] for group in groups] == names


def test_the_objective_changes_the_training(data, tmp_path):
    """That a killed run continues with the same weights of the groups is in test_resume.py."""
    for name, changes in {"dro": DRO, "erm": {}, "small": {**DRO, "group_step": 0.01}}.items():
        finetune(data, recipe(epochs=1, **changes), tmp_path / name)
    assert not same_weights(tmp_path / "dro", tmp_path / "erm")
    assert not same_weights(tmp_path / "dro", tmp_path / "small")


def test_the_last_layer_is_retrained_on_equally_drawn_groups(data, tmp_path):
    """DFR: the features stay those of the first run, and the rows are those of the validation split."""
    finetune(data, recipe(epochs=1), tmp_path / "erm")
    options = dict(init=str(tmp_path / "erm"), trainable="head", balanced=True, group="place", epochs=1, batch_size=4, lr=0.1)
    last = Recipe.read("head_only", {"model": "timm:resnet10t", "size": 32, **options})
    finetune(data, last, tmp_path / "dfr", train_split="val")
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("erm", "dfr"))
    assert {key.split(".")[0] for key in one if not torch.equal(one[key], other[key])} == {"heads"}
    record = json.loads((tmp_path / "dfr" / "run.json").read_text())
    held_out = read_table(data).of_split("val")
    assert record["data"]["groups"] == count_groups(held_out, "place") and record["train_files"] == held_out.names()
    assert not record["metrics"], "rows that were trained on are no validation rows"


def test_groups_are_drawn_equally(data, tmp_path):
    from l2r2_models.train.trainer import _trainer

    table = read_table(data)
    balanced = recipe(balanced=True, group="place", precision="fp32", channels_last=False)
    trainer = _trainer(create_model(balanced, len(table.classes())), balanced, table, None, table.classes(), tmp_path)
    groups = groups_of(table, "place")
    drawn = [groups[row] for batch in trainer.batches for row in batch]
    counts = [drawn.count(group) for group in set(groups)]
    assert len(counts) == max(groups) + 1 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "group_dro"}, "needs groups"),
        ({"group": "place"}, "group has no effect alone"),
        ({**DRO, "grad_accumulation": 2}, "set grad_accumulation to 1"),
        ({**DRO, "mixup": 0.2}, "mix images of different groups"),
        ({**DRO, "group_step": 0}, "group_step must be above 0"),
        ({**DRO, "objective": "dro"}, 'Unknown objective "dro"'),
        ({**DRO, "jtt": "runs/first"}, "jtt draws the rows by itself"),
        ({"jtt": "runs/first", "balanced": True}, "jtt draws the rows by itself"),
        ({"jtt": "runs/first", "jtt_factor": 1}, "jtt_factor must lie between 2 and 10,000"),
        ({"jtt_factor": 5}, "jtt_factor has no effect without jtt"),
        ({"group_step": 0.1}, "group_step must be above 0, for objective group_dro; got 0.1 for erm"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(L2R2Error, match=sentence):
        recipe(**changes)


def test_jtt_draws_what_the_first_run_misclassifies_more_often(data, tmp_path):
    from l2r2_models.evaluate.evaluator import judge_run

    finetune(data, recipe(epochs=1), tmp_path / "first")
    judged = judge_run(tmp_path / "first", data, "train", workers=0)
    wrong = judged.outputs[judged.answer].argmax(-1).ne(judged.data.labels).tolist()
    assert 0 < sum(wrong) < len(wrong), "some are wrong and some are not"
    table = read_table(data).of_split("train")
    first = FirstStage.read(str(tmp_path / "first"), 5, table.classes())
    assert first.errors(table, 5, 0, lambda steps, total: steps) == wrong
    names = first.upweighted(table, wrong).names()
    assert [names.count(name) for name in table.names()] == [5 if error else 1 for error in wrong]

    result = finetune(data, recipe(epochs=1, jtt=str(tmp_path / "first"), jtt_factor=5), tmp_path / "jtt")
    assert result.notes[0].endswith(f"{sum(wrong)} of 12 training images; each of them is drawn 5 times per epoch")
    assert result.images == 12
    record = json.loads((tmp_path / "jtt" / "run.json").read_text())
    assert record["jtt"]["digest"] == first.checkpoint.digest and record["train_files"] == table.names()
    assert load_checkpoint(tmp_path / "jtt").training["recipe"]["jtt"] == "first", "no path of this machine"
    finetune(data, recipe(epochs=1), tmp_path / "erm")
    assert not same_weights(tmp_path / "jtt", tmp_path / "erm")
    assert finetune(data, recipe(epochs=1, jtt=str(tmp_path / "first"), jtt_factor=5), tmp_path / "jtt").was_finished
    finetune(data, recipe(epochs=2), tmp_path / "first", overwrite=True)
    with pytest.raises(L2R2Error, match="--overwrite"):  # its errors are others now
        finetune(data, recipe(epochs=1, jtt=str(tmp_path / "first"), jtt_factor=5), tmp_path / "jtt")


def test_jtt_judges_the_first_run_with_box_scores_as_evaluate_does(data, tmp_path):
    run = write_run(tmp_path / "first", fusion="objectness_max_confidence")
    table = read_table(data).of_split("train")
    scores = (0.25, 1.0)  # the whole image decides, and the object may decide
    wrong = []
    for score in scores:
        rows = tuple(replace(row, entry=BoxEntry(row.entry.boxes, (score,), ("",))) for row in table.rows)
        scored = replace(table, rows=rows)
        checkpoint = load_checkpoint(run)
        found = branch_logits(checkpoint, scored)
        expected = fuse(checkpoint.model.fusion, found).argmax(-1).ne(found.labels).tolist()
        first = FirstStage.read(str(run), 2, table.classes())
        wrong.append(first.errors(scored, 5, 0, lambda steps, total: steps))
        assert wrong[-1] == expected
    assert wrong[0] != wrong[1]


def test_jtt_never_replaces_its_first_run(data, tmp_path):
    finetune(data, recipe(epochs=1), tmp_path / "first")
    with pytest.raises(L2R2Error, match="contains the run that jtt names"):
        finetune(data, recipe(epochs=1, jtt=str(tmp_path / "first")), tmp_path / "first", overwrite=True)
    assert (tmp_path / "first" / "model.safetensors").exists()


def test_jtt_needs_a_run_on_these_classes(data, tmp_path):
    other = write_run(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "label_names": ["a", "b", "c"]}))
    with pytest.raises(L2R2Error, match="was trained on other classes"):
        finetune(data, recipe(jtt=str(other)), tmp_path / "run")
    with pytest.raises(L2R2Error, match="no such folder"):
        finetune(data, recipe(jtt=str(tmp_path / "nothing")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_column_is_reported_before_the_images_are_read(data, tmp_path):
    with pytest.raises(L2R2Error, match='no column "site"'):
        finetune(data, recipe(**{**DRO, "group": "site"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
