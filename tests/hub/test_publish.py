"""`l2r2 publish`: its output, what it refuses to upload, and that the uploaded files are the prepared ones."""

import json
import re
import sys

import pytest
import timm
import torch
from conftest import COLORS, write_run
from hub_double import TOKEN, HubDouble

from l2r2_cli.commands import main
from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.hub.card import model_card
from l2r2_models.hub.metadata import CardMetadata
from l2r2_models.hub.publish import prepare, push, text_problems
from l2r2_models.runs import read_evaluations, store_evaluation

FACTS = CardMetadata(
    license="apache-2.0",
    data="Colored squares",
    data_license="cc0-1.0",
    localizer="owlv2",
    prompt="square",
    localizer_license="apache-2.0",
    limits="Not for triangles.",
)
ROW = {"accuracy": 0.9375, "macro_accuracy": 0.9, "ece": 0.05, "with_box": 0.95, "without_box": None}
EVALUATION = {
    "split": "test_ood",
    "images": 160,
    "with_object": 150,
    "oracle": 0.97,
    "fitted_on": None,
    "warnings": ["3 of the 160 images of test_ood were trained on."],
    "rows": {
        "full": {
            **ROW,
            "accuracy": 0.25,
            "intervals": {"accuracy": [0.19, 0.325]},
            "worst_group": 0.1,
            "by_group": {"snow|ice": 0.1, "": 0.4},
        },
        "fg": {**ROW, "worst_group": 0.5, "by_group": {"snow|ice": 0.5, "": 1.0}},
        "fused: robust": {**ROW, "worst_group": 0.5, "by_group": {"snow|ice": 0.5, "": 1.0}},
        "average": {**ROW, "accuracy": 0.5},
    },
}


@pytest.fixture
def finished(tmp_path):
    """A run with the record of a training, and an evaluation."""
    run = write_run(tmp_path / "runs" / "squares")
    checkpoint = hub.load_checkpoint(run)
    training = {
        "recipe": {"model": "timm:resnet10t", "pretrained": False, "epochs": 3, "lr": 0.001, "fusion": "robust"},
        "data": {"images": 12, "with_box": 11, "folder": "/nfs/somebody/photos", "train": "0123"},
    }
    hub.save_checkpoint(checkpoint.model, run, checkpoint.labels, training)
    record = {"command": "l2r2 finetune /home/somebody/photos", "metrics": {"fg_accuracy": 0.5, "fused_accuracy": 0.75}}
    (run / "run.json").write_text(json.dumps({**training, **record, "val_files": ["a.png", "b.png"]}))
    store_evaluation(run, tmp_path / "fod", hub.load_checkpoint(run).digest, EVALUATION)
    return run


TINY_VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 1}
KINDS = {
    "ifam": ("ifam_vit_tiny_patch16_224", TINY_VIT),
    "tokens": ("l2r2", {"backbone": "vit_tiny_patch16_224", "fg_mode": "tokens", **TINY_VIT}),
    "late": ("l2r2", {"backbone": "resnet10t", "fg_mode": "late"}),
    "box head": ("l2r2", {"backbone": "resnet10t", "box_head": True}),
    "gray": ("l2r2", {"backbone": "resnet10t", "in_chans": 1}),
    "full": ("l2r2", {"backbone": "resnet10t", "branches": ("full",)}),
    "fg": ("l2r2", {"backbone": "resnet10t", "branches": ("fg",)}),
}


def write_kind(folder, kind, **saved):
    """A checkpoint of that kind of model, with random weights."""
    torch.manual_seed(0)
    name, options = KINDS[kind]
    model = timm.create_model(name, num_classes=3, **options)
    model.view_spec = ViewSpec.from_dict({**model.view_spec.to_dict(), "size": 32})
    hub.save_checkpoint(model, folder, sorted(COLORS), **saved)
    return folder


@pytest.fixture
def there(tmp_path, monkeypatch):
    with HubDouble().running() as double:
        double.connect(monkeypatch, tmp_path / "home", TOKEN)
        yield double


@pytest.fixture
def l2r2(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["l2r2", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


def made(run, tmp_path, facts=FACTS, **options):
    folder = tmp_path / "package"
    return prepare(run, "org/squares", folder, facts, **options)


def test_what_would_go_up_is_three_files_without_a_path_of_this_machine(finished, tmp_path):
    package = made(finished, tmp_path)
    assert package.problems == () and set(package.files) == {"README.md", "config.json", "model.safetensors"}
    assert sorted(p.name for p in package.folder.iterdir()) == sorted(package.files)
    text = (package.folder / "config.json").read_text() + (package.folder / "README.md").read_text()
    assert "/nfs" not in text and "/home" not in text and str(tmp_path) not in text
    config = json.loads((package.folder / "config.json").read_text())
    assert config["l2r2"]["training"]["data"]["folder"] == "photos"
    assert config["l2r2"]["localizer"] == {"spec": "owlv2", "prompt": "square", "license": "apache-2.0"}
    assert hub.load_checkpoint(package.folder).digest == hub.load_checkpoint(finished).digest


def test_the_card_lists_the_metrics_and_its_metadata_can_be_read_back(finished, tmp_path):
    from huggingface_hub import ModelCard

    text = (made(finished, tmp_path).folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-classification"
    figures = {r.metric_name: (r.dataset_name, r.dataset_split, r.metric_value) for r in card.data.eval_results}
    assert figures["accuracy (full)"] == ("Colored squares", "test_ood", 0.25)
    assert figures["accuracy (fused)"] == ("Colored squares", "test_ood", 0.9375)
    assert not any("average" in name for name in figures)  # a fusion tried for comparison is not the model's
    for said in (
        "| full | 25.0 (19.0 to 32.5) |",
        "| snow\\|ice | 10.0 | 50.0 | 50.0 |",
        "3 of the 160 images",
        "Not for triangles.",
        "cc0-1.0",
        "`owlv2` with the prompt `square`; license of the localizer: apache-2.0",
        "`robust` (threshold 0.5)",
        "random weights",
        "arXiv:2411.15933",
        *COLORS,
    ):
        assert said in text, said


def test_evaluations_of_other_weights_are_left_out(finished, tmp_path):
    checkpoint = hub.load_checkpoint(finished)
    assert [e["split"] for e in read_evaluations(finished, digest=checkpoint.digest)] == ["test_ood"]
    assert read_evaluations(finished, digest="of another training") == ()
    for broken in ({}, [], {**EVALUATION, "rows": {"full": {"accuracy": 94}}}, {**EVALUATION, "split": None}):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(L2R2Error, match=r"broken\.json"):
            read_evaluations(finished, [tmp_path / "broken.json"])


def test_without_an_evaluation_the_card_has_the_validation_metrics(finished, tmp_path):
    for file in (finished / "evaluations").iterdir():
        file.unlink()
    package = made(finished, tmp_path)
    text = (package.folder / "README.md").read_text()
    assert package.problems == () and "| fused: robust | 75.0 |" in text
    assert "split validation (of the training): 2 images" in text


def test_the_validation_metrics_of_a_replaced_fusion_are_left_out(finished, tmp_path):
    """Those of finetune are of the fusion before the fit."""
    checkpoint = hub.load_checkpoint(finished)
    fit = {"split": "val", "backgrounds": "both", "group": "plant", "rows": 72, "method": "best_on_val", "accuracy": 0.5}
    hub.save_checkpoint(checkpoint.model, finished, checkpoint.labels, {**checkpoint.training, "fusion_fit": fit})
    for file in (finished / "evaluations").iterdir():
        file.unlink()
    text = (made(finished, tmp_path).folder / "README.md").read_text()
    assert "| fg | 50.0 |" in text and "fused: robust" not in text
    assert "chosen and fitted on 72 views of the split val, half of them unchanged images, half objects on" in text
    assert "those of the same plant kept together" in text


def test_what_stands_against_publishing(tmp_path):
    run = write_run(tmp_path / "run")
    found = " ".join(made(run, tmp_path, CardMetadata()).problems)
    assert "There is no license" in found and "There are no metrics" in found
    package = prepare(run, "org/x", tmp_path / "b", CardMetadata("mit"), without_metrics=True)
    assert package.problems == () and "Not evaluated." in (tmp_path / "b" / "README.md").read_text()
    (run / "run.json").write_text("{}")
    assert "the training has not finished" in prepare(run, "org/x", tmp_path / "c", FACTS, without_metrics=True).problems[0]
    with pytest.raises(L2R2Error, match="not a Hub id of the form org/name"):
        prepare(run, "name", tmp_path / "d", FACTS)
    (run / "optimizer.pt").write_bytes(b"\x80\x04")
    with pytest.raises(L2R2Error, match=r"contains optimizer\.pt; pickled weights"):
        prepare(run, "org/x", tmp_path / "e", FACTS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_published(tmp_path, kind):
    run = write_kind(tmp_path / "run", kind)
    assert prepare(run, "org/x", tmp_path / "package", CardMetadata("mit"), without_metrics=True).problems == ()


SAID = {  # what the card says of each kind of model, and what it must not
    "ifam": (["gives the fused prediction, and needs no boxes", "The network finds the object itself"], ["boxes=", "Localizer"]),
    "tokens": (["so that a misleading background matters less", "fg: tokens |", "boxes=[["], ["margin"]),
    "late": (["masked inside the network", "is the whole-image branch alone"], ["cut out of it"]),
    "box head": (["boxes from its own box head", 'localizer="head")', "predict(photo)"], ["not stated.", "boxes=[["]),
    "gray": (["As a plain timm model (in_chans=1), it"], ["Predictor", "`pipeline`"]),
    "full": (["(the whole image). Made", "gives the same prediction"], ["misleading", "fg:", "boxes", "Localizer"]),
    "fg": (["is the fg branch alone", "without boxes, the whole image counts as the object"], ["misleading"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_fits_the_kind_of_model_and_its_usage_runs(tmp_path, kind):
    localizer = {"spec": "head"} if kind == "box head" else None
    run = write_kind(tmp_path / "run", kind, localizer=localizer)
    card = model_card(hub.load_checkpoint(run), "org/x", CardMetadata(), ())
    said, not_said = SAID[kind]
    assert [part for part in said if part not in card] == [] and [part for part in not_said if part in card] == []
    for block in re.findall(r"```python\n(.*?)```", card, re.S):
        exec(block.replace("hf-hub:org/x", f"local-dir:{run}").replace("org/x", str(run)), {})


def test_predictor_refuses_a_model_that_does_not_take_rgb(tmp_path):
    with pytest.raises(L2R2Error, match="takes 1 channels, but Predictor reads RGB"):
        Predictor.from_pretrained(write_kind(tmp_path / "run", "gray"))


def test_the_usage_names_a_localizer_that_others_can_have(run):
    checkpoint = hub.load_checkpoint(run)
    line = '# to find the boxes automatically: Predictor.from_pretrained("org/x", localizer="owlv2:google/owlv2?prompt=a bird")'
    assert line in model_card(checkpoint, "org/x", CardMetadata(localizer="owlv2:google/owlv2", prompt="a bird"), ())
    assert 'localizer="detr:org/detr"' in model_card(checkpoint, "org/x", CardMetadata(localizer="detr:org/detr"), ())
    for spec in ("owlv2:google/owlv2", "owlv2?prompt=bird", "detr", "boxes:mine.json", "cam:runs/x", "head", "by hand", "?"):
        assert "localizer=" not in model_card(checkpoint, "org/x", CardMetadata(localizer=spec), ()), spec


@pytest.mark.parametrize(
    ("method", "fusion", "sentence"),
    [
        ("best_on_val", "average", "The fusion was chosen on 24 views of the split val."),
        ("robust", "robust", "The fusion was fitted on 24 views of the split val."),
        ("average", "average", "The fusion was set by hand and has no fitted parameters."),
    ],
)
def test_the_card_says_what_the_fusion_was_fitted_or_chosen_on(tmp_path, method, fusion, sentence):
    run = write_run(tmp_path / "run", fusion=fusion)
    fit = {"split": "val", "backgrounds": "plain", "group": None, "rows": 24, "method": method}
    hub.save_checkpoint(hub.load_checkpoint(run).model, run, sorted(COLORS), {"fusion_fit": fit})
    assert sentence in model_card(hub.load_checkpoint(run), "org/x", CardMetadata(), ())


@pytest.mark.parametrize("license", ["Apache 2", "MIT", "apache_2.0", "mit\n"])
def test_a_license_is_written_as_the_hub_writes_it(run, tmp_path, license):
    (problem,) = prepare(run, "org/x", tmp_path / "package", CardMetadata(license), without_metrics=True).problems
    assert "is not a license as the Hub spells it" in problem


def test_the_license_of_the_source_is_respected(tmp_path):
    run = write_run(tmp_path / "run")
    model = hub.load_checkpoint(run).model
    recipe = {"model": "l2r2_convnextv2_atto", "pretrained": True}
    hub.save_checkpoint(model, run, sorted(COLORS), {"recipe": recipe})
    (problem,) = prepare(run, "org/x", tmp_path / "a", CardMetadata("apache-2.0"), without_metrics=True).problems
    assert "cc-by-nc-4.0" in problem
    assert prepare(run, "org/x", tmp_path / "b", CardMetadata("cc-by-nc-4.0"), without_metrics=True).problems == ()
    assert "huggingface.co/timm/convnextv2_atto.fcmae_ft_in1k" in (tmp_path / "b" / "README.md").read_text()


def test_numbers_for_labels_and_weights_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / "run")
    model = hub.load_checkpoint(run).model
    with torch.no_grad():
        model.heads["fg"].bias[0] = float("nan")
    hub.save_checkpoint(model, run, ["0", "1", "2"])
    found = " ".join(prepare(run, "org/x", tmp_path / "a", FACTS, without_metrics=True).problems)
    assert "The labels are 0, 1, ..." in found and "not finite" in found
    run = write_run(tmp_path / "years")
    hub.save_checkpoint(hub.load_checkpoint(run).model, run, ["1990", "1991", "1992"])
    assert prepare(run, "org/x", tmp_path / "b", FACTS, without_metrics=True).problems == ()


@pytest.mark.parametrize("secret", ["hf_" + "a1B2" * 8, "ghp_" + "x" * 36, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----"])
def test_secrets_are_found_and_not_repeated(finished, tmp_path, secret):
    package = made(finished, tmp_path, CardMetadata("mit", limits=f"token {secret}"))
    (problem,) = package.problems
    assert problem.startswith("README.md contains what looks like") and secret not in problem
    with pytest.raises(L2R2Error, match="not pushed"):
        push(package)


@pytest.mark.parametrize("path", ["/home/me/x.jpg", "see /mnt/disk/a", "C:\\Users\\me", "local-dir:/srv/run", "~/runs/a"])
def test_paths_of_this_machine_are_found(path):
    assert text_problems({"README.md": path})
    assert not text_problems({"README.md": "https://example.org/home/page and org/name, 1/2, and/or /m/0abc"})


# ---- pushing ----


def test_a_dry_run_sends_nothing(finished, there, l2r2):
    code, out, err = l2r2("publish", finished, "org/squares", "--license", "mit")
    assert code == 0, err
    assert "nothing was uploaded; pass --push to upload to org/squares" in out and "model.safetensors" in out
    assert there.log == [] and there.repos == {}


def test_push_is_one_commit_with_the_same_predictions(finished, there, l2r2):
    code, out, err = l2r2("publish", finished, "org/squares", "--license", "mit", "--push")
    assert code == 0, err
    assert "hashes verified" in out
    repo = there.repos["org/squares"]
    assert repo.messages == ["initial commit", "Upload with l2r2-models"] and not repo.private
    assert {"README.md", "config.json", "model.safetensors"} == set(repo.files("main")[1]) - {".gitattributes"}
    box = [[4.0, 4, 40, 40]]
    from PIL import Image

    photo = Image.effect_noise((64, 48), 80).convert("RGB")
    answers = [Predictor.from_pretrained(source, device="cpu")(photo, box).to_dict() for source in ("org/squares", finished)]
    assert answers[0] == answers[1]
    again, out, _ = l2r2("publish", finished, "org/squares", "--license", "mit", "--push", "--json")
    assert again == 0 and json.loads(out)["pushed"]["commit"]
    assert there.count("PUT") == 1  # the weights were there already


def test_the_usage_of_the_card_runs_as_pasted(finished, there, l2r2, capsys):
    assert l2r2("publish", finished, "org/squares", "--license", "mit", "--push")[0] == 0
    blocks = re.findall(r"```python\n(.*?)```", there.repos["org/squares"].files("main")[1]["README.md"].decode(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert any(color in capsys.readouterr().out for color in COLORS)


def test_private_branch_and_pull_request(finished, there, l2r2, monkeypatch):
    push = ("publish", finished, "org/squares", "--license", "mit", "--push")
    assert l2r2(*push, "--private")[0] == 0 and there.repos["org/squares"].private
    assert l2r2(*push, "--revision", "next", "--message", "second")[0] == 0
    assert {"main", "next"} <= set(there.repos["org/squares"].refs)
    code, out, _ = l2r2(*push, "--create-pr", "--limits", "None known.")
    assert code == 0 and "/discussions/1" in out and "None known." not in str(there.repos["org/squares"].files("main"))
    assert b"None known." in there.repos["org/squares"].files("refs/pr/1")[1]["README.md"]
    code, _, err = l2r2(*push, "--create-pr", "--revision", "next")
    assert code == 1 and "do not pass --revision" in err
    there.add("org/public", {"README.md": b""})
    code, _, err = l2r2("publish", finished, "org/public", "--license", "mit", "--push", "--private")
    assert code == 1 and "exists and is public" in err and there.repos["org/public"].messages == ["first"]


def test_whoever_is_not_logged_in_or_may_not_write(finished, there, l2r2, monkeypatch):
    push = ("publish", finished, "org/squares", "--license", "mit", "--push")
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = l2r2(*push)
    assert code == 1 and "run `hf auth login`" in err and there.log == []
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    code, _, err = l2r2(*push)
    assert code == 1 and "no permission to write" in err and "Traceback" not in err and "hf_of" not in err


def test_an_upload_that_breaks_off(finished, there, l2r2, monkeypatch):
    """The library tries again by itself; where that is in vain nothing is half there, and the same command works later."""
    push = ("publish", finished, "org/squares", "--license", "mit", "--push")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    there.break_uploads = 1000
    code, _, err = l2r2(*push)
    assert code == 1 and "the same command tries again" in err and "Traceback" not in err
    assert there.repos["org/squares"].messages == ["initial commit"]
    there.break_uploads = 1
    assert l2r2(*push)[0] == 0 and len(there.repos["org/squares"].messages) == 2


def test_other_hashes_there_than_here(finished, tmp_path, there, monkeypatch):
    import hub_double

    entry = hub_double.entry_of
    monkeypatch.setattr(hub_double, "entry_of", lambda path, content: entry(path, content + b"x" * (path == "config.json")))
    with pytest.raises(L2R2Error, match=r"the Hub's config\.json differs"):
        push(made(finished, tmp_path))


def test_evaluate_stores_its_metrics_for_the_card(finished, dataset, tmp_path, l2r2):
    assert l2r2("evaluate", finished, dataset, "--split", "test")[0] == 0
    evaluations = {e["split"]: e for e in read_evaluations(finished, digest=hub.load_checkpoint(finished).digest)}
    assert evaluations["test"]["data"] == dataset.name and evaluations["test"]["images"] == 12
    text = (made(finished, tmp_path).folder / "README.md").read_text()
    assert f"{dataset.name}, split test: 12 images" in text and str(tmp_path) not in text
