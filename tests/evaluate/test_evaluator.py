"""Evaluation: its warnings and notes, nothing is fitted on the evaluated rows, ensembles, absent classes."""

import json
import math

import pytest
import torch
from conftest import sentence, write_run
from sklearn.metrics import confusion_matrix as reference_confusion
from sklearn.metrics import recall_score
from torch.nn.functional import cross_entropy

from l2r2_models import L2R2Error
from l2r2_models.evaluate.evaluator import SHARES, evaluate_run, evaluation_of, judge_run
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.evaluate.metrics import bootstrap_interval, most_confused, recalls, reliability_bins
from l2r2_models.fusion.calibration import expected_calibration_error


@pytest.fixture
def own_run(tmp_path):
    return write_run(tmp_path / "run")


def drawn(seed=0, rows=80, classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return 2 * torch.randn(rows, classes, generator=generator) + torch.eye(classes)[labels], labels


def relabel(dataset, split, change):
    """Rewrite the labels of a split: `change` maps the number of a row and its label to another label."""
    lines = (dataset / "metadata.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    rows = [row for row in cells if row[2] == split]
    for i, row in enumerate(rows):
        row[1] = change(i, row[1])
    (dataset / "metadata.csv").write_text("\n".join(",".join(row) for row in cells))


def test_nothing_is_fitted_on_the_evaluated_rows(own_run, dataset):
    """Other labels on the judged split change figures, and no number of a fusion or a temperature."""

    def fitted():
        judged = judge_run(own_run, dataset, "test", fit_split="val", group="label")
        numbers = {name: [b.clone() for b in fusion.buffers()] for name, fusion in judged.fusions.items()}
        return numbers, judged.temperatures, {n: z.clone() for n, z in judged.outputs.items()}, evaluation_of(judged)

    numbers, temperatures, outputs, before = fitted()
    others = {"red": "green", "green": "blue", "blue": "red"}
    relabel(dataset, "test", lambda i, label: others[label])
    again, same_temperatures, same_outputs, after = fitted()
    assert numbers and all(torch.equal(a, b) for name in numbers for a, b in zip(numbers[name], again[name], strict=True))
    assert temperatures == same_temperatures and set(temperatures) == set(outputs)
    assert all(torch.equal(outputs[name], same_outputs[name]) for name in outputs)
    assert any(before.rows[name]["accuracy"] != after.rows[name]["accuracy"] for name in outputs)
    relabel(dataset, "val", lambda i, label: others[label])
    assert fitted()[1] != temperatures  # whereas the split to fit on matters


def test_temperatures_calibrate_the_rows_they_were_fitted_on(own_run, dataset):
    """With the same rows under another name, the scaled logits have the least cross-entropy, with 3 rows of unknown class."""
    text = (dataset / "metadata.csv").read_text()
    twins = [line.replace(",val,", ",twin,").replace("val_", "twin_") for line in text.splitlines() if ",val," in line]
    (dataset / "metadata.csv").write_text("\n".join([text.strip(), *twins]))
    for path in (dataset / "images").glob("val_*"):
        (path.parent / path.name.replace("val_", "twin_")).write_bytes(path.read_bytes())
    judged = judge_run(own_run, dataset, "val", fit_split="twin")
    figures = evaluation_of(judged).rows
    for name, z in judged.outputs.items():
        t = judged.temperatures[name]
        unknown = 3 / (len(z) + 3)
        loss = {}
        for f in (0.9, 1, 1.1):
            nothing_known = -(z / (t * f)).log_softmax(-1).mean()
            loss[f] = float((1 - unknown) * cross_entropy(z / (t * f), judged.data.labels) + unknown * nothing_known)
        assert loss[1] <= min(loss.values()) + 1e-6 or t in (0.05, 20.0)
        assert figures[name]["ece_scaled"] == pytest.approx(expected_calibration_error(z / t, judged.data.labels))
    assert "ece_scaled" not in evaluate_run(own_run, dataset, "val").rows["full"]


def test_the_calibration_error_is_that_of_a_naive_loop_and_of_the_diagram():
    logits, labels = drawn(rows=300)
    probabilities = logits.double().softmax(-1)
    total = 0.0
    for k in range(15):
        inside = [i for i in range(300) if k / 15 < float(probabilities[i].max()) <= (k + 1) / 15]
        if inside:
            sure = sum(float(probabilities[i].max()) for i in inside) / len(inside)
            right = sum(int(probabilities[i].argmax()) == int(labels[i]) for i in inside) / len(inside)
            total += len(inside) / 300 * abs(sure - right)
    assert expected_calibration_error(logits, labels) == pytest.approx(total, abs=1e-6)
    rows, sure, right = reliability_bins(logits, labels)
    assert rows.sum() == 300 and float((rows * (sure - right).abs()).sum() / 300) == pytest.approx(total, abs=1e-6)


def test_the_risk_is_the_error_rate_of_the_most_confident(own_run, dataset):
    judged = judge_run(own_run, dataset, "test")
    risk = evaluation_of(judged).risk
    assert set(risk) == set(judged.own)
    for name, found in risk.items():
        sure, predicted = judged.outputs[name].softmax(-1).max(-1)
        wrong = predicted != judged.data.labels
        for share, value in zip(SHARES, found):
            least = sure.sort(descending=True).values[math.ceil(share * len(sure) - 1e-9) - 1]
            assert value == pytest.approx(float(wrong[sure >= least].double().mean()))
        assert found[-1] == pytest.approx(float(wrong.double().mean()))


def test_recall_and_confusion_are_scikit_learns(own_run, dataset):
    logits, labels = drawn()
    found = recalls(logits.argmax(-1), labels, ["a", "b", "c", "d", "never"])
    assert found.pop("never") is None
    assert list(found.values()) == pytest.approx(recall_score(labels, logits.argmax(-1), average=None).tolist())
    judged = judge_run(own_run, dataset, "test")
    result = evaluation_of(judged)
    assert list(result.confusion) == ["full", "fg", "fused: robust"] and result.labels == ("blue", "green", "red")
    for name, matrix in result.confusion.items():
        assert matrix == reference_confusion(judged.data.labels, judged.outputs[name].argmax(-1), labels=range(3)).tolist()
    assert most_confused(torch.tensor([[5, 2, 0], [3, 9, 0], [0, 1, 4]]), 2) == [(1, 0, 3), (0, 1, 2)]


def test_intervals_are_those_of_a_naive_bootstrap():
    _, labels = drawn(rows=200)
    right = (torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.7).double()
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(200, (200,), generator=generator) for _ in range(3000)]
    means = sorted(float(right[i].mean()) for i in rows)
    macro = sorted(sum(float(right[i][labels[i] == k].mean()) for k in range(4)) / 4 for i in rows)
    for naive, interval in ((means, bootstrap_interval(right)), (macro, bootstrap_interval(right, classes=labels))):
        assert interval == pytest.approx((naive[75], naive[2925]), abs=0.015)
    values = torch.rand(200, generator=generator)
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(torch.ones(5)) == (1, 1) and bootstrap_interval(torch.tensor([0.25])) == (0.25, 0.25)
    with pytest.raises(L2R2Error, match="at least one row"):
        bootstrap_interval(torch.ones(0))


def test_rows_of_one_image_are_drawn_together():
    """Each row twice tells no more than each row once; a naive interval would be narrower by the root of two."""
    right = (torch.rand(100, generator=torch.Generator().manual_seed(1)) < 0.6).double()
    once, twice = bootstrap_interval(right), right.repeat_interleave(2)
    together = bootstrap_interval(twice, clusters=torch.arange(100).repeat_interleave(2) + 7)
    assert together == pytest.approx(once)
    low, high = bootstrap_interval(twice)
    assert high - low < 0.85 * (once[1] - once[0])


def test_an_ensemble_is_the_mean_of_the_probabilities_whatever_the_order_of_the_labels(own_run, dataset, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    outputs = judge_run(own_run, dataset, "test", others=[other], fit_split="val").outputs
    alone = judge_run(other, dataset, "test").outputs
    for name, (a, b) in {"full x full": ("full",) * 2, "fg x fg": ("fg",) * 2, "fused x fused": ("fused: robust",) * 2}.items():
        mean = (outputs[a].softmax(-1) + alone[b].softmax(-1)) / 2
        assert torch.allclose(outputs[name].softmax(-1), mean, atol=1e-5)
    config = json.loads((other / "config.json").read_text())
    config["label_names"] = config["label_names"][::-1]
    (other / "config.json").write_text(json.dumps(config))
    turned = judge_run(own_run, dataset, "test", others=[other]).outputs["full x full"]
    mean = (outputs["full"].softmax(-1) + alone["full"].softmax(-1).flip(-1)) / 2
    assert torch.allclose(turned.softmax(-1), mean, atol=1e-5)
    assert "full x full x full" in judge_run(own_run, dataset, "test", others=[other, own_run]).outputs
    plain = write_run(tmp_path / "plain", branches=("full",))
    assert [n for n in judge_run(own_run, dataset, "test", others=[plain]).outputs if " x " in n] == ["full x full"]


def test_an_ensemble_of_other_classes_is_refused(own_run, dataset, tmp_path):
    other = write_run(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["label_names"][0] = "teal"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(L2R2Error, match=r"other: its classes differ from those of .*run \(only one of them has blue, teal\)"):
        evaluate_run(own_run, dataset, "test", others=[other])


def test_rows_that_an_ensembles_other_run_was_trained_on_warn(own_run, dataset, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    (other / "run.json").write_text(json.dumps({"train_files": ["images/test_000.png"]}))
    assert evaluate_run(own_run, dataset, "test").warnings == ()
    assert "1 of the 12 images of test were trained on" in evaluate_run(own_run, dataset, "test", others=[other]).warnings[0]


def test_fitting_on_rows_that_one_of_the_runs_was_trained_on_warns(own_run, dataset, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    (other / "run.json").write_text(json.dumps({"train_files": [f"images/val_00{i}.png" for i in range(4)]}))
    (warning,) = evaluate_run(own_run, dataset, "test", fit_split="val", others=[other]).warnings
    assert warning == f"{other}: 4 of the 12 images of val were trained on; a fusion fitted on them will overrate this run."
    assert evaluate_run(own_run, dataset, "test", fit_split="val").warnings == ()


def test_mistakes_of_the_command_show_before_the_network_runs(own_run, dataset, tmp_path):
    passes = []
    count = lambda batches, total: passes.append(total) or batches  # noqa: E731
    for options in ({"group": "weather"}, {"fit_split": "dev"}, {"prior": "label"}):
        with pytest.raises(L2R2Error):
            judge_run(own_run, dataset, "test", progress=count, **options)
    with pytest.raises(L2R2Error, match="has only the branch full, so there is no fusion to fit on val"):
        judge_run(write_run(tmp_path / "plain", branches=("full",)), dataset, "test", fit_split="val", progress=count)
    assert passes == []


def test_classes_that_do_not_occur_are_noted_and_not_counted(own_run, dataset):
    relabel(dataset, "test", lambda i, label: "red" if label == "blue" else label)
    judged = judge_run(own_run, dataset, "test")
    figures = evaluation_of(judged)
    assert figures.notes == ("1 of 3 classes do not occur in test (blue); the macro accuracy leaves them out.",)
    recall = figures.rows["full"]["recall"]
    assert recall["blue"] is None
    assert figures.rows["full"]["macro_accuracy"] == pytest.approx((recall["green"] + recall["red"]) / 2)


def test_a_split_of_one_class_is_evaluated_with_a_note(own_run, dataset):
    relabel(dataset, "test", lambda i, label: "red")
    figures = evaluate_run(own_run, dataset, "test", fit_split="val")
    assert figures.notes == ("All images of test show red: the accuracy is the recall of this class.",)
    for row in figures.rows.values():
        assert row["accuracy"] == row["macro_accuracy"] == row["recall"]["red"]


def test_classes_that_training_never_saw_are_named(own_run, dataset):
    relabel(dataset, "test", lambda i, label: "lynx" if i < 2 else "wolf" if i == 3 else label)
    message = r"3 of the 12 images of test have classes that .*run was not trained on: lynx \(2\), wolf \(1\); take them out"
    with pytest.raises(L2R2Error, match=message):
        evaluate_run(own_run, dataset, "test")


def test_bad_images_are_left_out_named_and_counted(own_run, dataset):
    """Those of the judged split and those fitted on; what is left is judged as if they had never been there."""
    bad = [dataset / "images" / name for name in ("test_001.png", "test_007.png", "val_000.png")]
    for path in bad:
        path.write_bytes(b"PK\x03\x04")
    with pytest.raises(L2R2Error, match=r"test_001\.png: is a ZIP archive\. .*--skip-bad"):
        evaluate_run(own_run, dataset, "test")
    figures = evaluate_run(own_run, dataset, "test", fit_split="val", skip_bad=True)
    assert (figures.images, figures.with_object) == (10, 10) and set(figures.left_out) == {str(path) for path in bad}
    assert (
        figures.notes[0] == ("2 of 12 images of test cannot be used and are left out, e.g. test_001.png, test_007.png.")
        and "1 of 12 images of val" in figures.notes[1]
    )
    assert evaluate_run(own_run, dataset, "test", fit_split="val", skip_bad=True) == figures  # from the store
    with pytest.raises(L2R2Error, match="test_001"):  # which does not hide them from those who did not ask
        evaluate_run(own_run, dataset, "test")
    assert len(fit_run(own_run, dataset, "val", method="average", skip_bad=True).left_out) == 1
    lines = [line for line in (dataset / "metadata.csv").read_text().splitlines() if not any(p.name in line for p in bad)]
    (dataset / "metadata.csv").write_text("\n".join(lines))
    clean = evaluate_run(own_run, dataset, "test", fit_split="val")
    assert all(clean.rows[name]["accuracy"] == figures.rows[name]["accuracy"] for name in ("full", "fg"))


def test_no_usable_image_at_all_is_a_sentence(own_run, dataset):
    for path in (dataset / "images").glob("test_*"):
        path.write_bytes(b"")
    with pytest.raises(L2R2Error, match=r"None of the 12 images can be used. The first one: .*test_000\.png: is empty"):
        evaluate_run(own_run, dataset, "test", skip_bad=True)


def test_a_repaired_image_is_evaluated_again(own_run, dataset):
    path = dataset / "images" / "test_001.png"
    content = path.read_bytes()
    path.write_bytes(b"")
    assert evaluate_run(own_run, dataset, "test", skip_bad=True).images == 11
    path.write_bytes(content)
    assert evaluate_run(own_run, dataset, "test", skip_bad=True).images == 12


def test_the_gain_is_over_full_and_has_its_own_interval(own_run, dataset):
    figures = evaluate_run(own_run, dataset, "test").rows
    assert "gain" not in figures["full"]
    assert figures["fg"]["gain"] == pytest.approx(figures["fg"]["accuracy"] - figures["full"]["accuracy"])
    low, high = figures["fg"]["intervals"]["gain"]
    assert low <= figures["fg"]["gain"] <= high
    json.dumps(figures, allow_nan=False)


def test_the_command_prints_and_writes_everything(l2r2, own_run, dataset, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    (dataset / "images" / "test_001.png").write_bytes(b"PK\x03\x04")
    base = ["evaluate", own_run, dataset, "--group", "label", "--fit-split", "val", "--with", other, "--skip-bad"]
    result = l2r2(*base, "--report", tmp_path / "r" / "report.html")
    assert result.returncode == 0, result.stderr
    assert "fused x fused" in result.stdout and "ECE scaled" in result.stdout and "most confused" in result.stdout
    assert "1 of 12 images of test cannot be used" in result.stdout and "test_001.png: is a ZIP archive" in result.stderr
    assert (tmp_path / "r" / "report.html").stat().st_size > 20_000
    answer = json.loads(l2r2(*base, "--json", "--report", tmp_path / "report.html").stdout)
    assert answer["images"] == 11 and answer["rows"]["fg"]["intervals"]["accuracy"] and len(answer["confusion"]["full"]) == 3
    assert "is a ZIP archive" in sentence(l2r2(*base[:3]))
    (tmp_path / "r" / "report.html").unlink()
    (tmp_path / "r" / "report.html").mkdir()
    assert "report.html" in sentence(l2r2(*base, "--report", tmp_path / "r" / "report.html"))


def test_a_plain_classifier_has_a_report_too(dataset, tmp_path):
    from l2r2_models.report.evaluation import write_evaluation

    judged = judge_run(write_run(tmp_path / "plain", branches=("full",)), dataset, "test")
    write_evaluation(tmp_path / "r.html", [judged], [evaluation_of(judged)])
    text = (tmp_path / "r.html").read_text()
    assert "The whole image alone is correct in" in text and "fused" not in text and "gain over full" not in text
