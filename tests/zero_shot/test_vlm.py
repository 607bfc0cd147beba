"""Zero-shot models: the libraries' own pipelines agree, and predict, evaluate, audit, explain and fuse take them."""

import json

import numpy as np
import pytest
import torch
import vlm_cases
from PIL import Image
from typer.testing import CliRunner

import l2r2_models
from l2r2_cli.commands import app
from l2r2_models import L2R2Error, ZeroShotL2R2, load_checkpoint, make_views
from l2r2_models.audit.audit import run_audit
from l2r2_models.checkpoints.zero_shot import ZeroShotSpec
from l2r2_models.evaluate.evaluator import judge_run
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.evaluate.zero_shot import debiased
from l2r2_models.explain.explainer import Explainer
from l2r2_models.fusion import create_fusion

NAMES = ["red fox", "cat", "dog"]
TEMPLATE = "This is a photo of {}."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return vlm_cases.clip(tmp_path_factory.mktemp("clip"))


def noise(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise images with a box in each; the labels are the names of `NAMES`."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["file_name,label,split,x0,y0,x1,y1"]
    for i in range(24):
        noise(i, (48, 72)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{NAMES[i % 3]},{'val' if i < 12 else 'test'},{i},4,{i + 30},40")
    (folder / "metadata.csv").write_text("\n".join(rows))
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def source(model, data, more=""):
    return f"vlm:{model}?names={data / 'names.txt'}{more}"


def full_logits(folder, names, image, template=TEMPLATE):
    predict = ZeroShotL2R2.from_pretrained(str(folder), names, template=template)
    views = make_views([image], None, predict.model.view_spec, branches=("full",))
    return predict.model.forward_views(full=views.full).full[0]


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_full_equals_the_pipeline_of_transformers(family, tmp_path):
    from transformers import pipeline

    folder, image = vlm_cases.MAKERS[family](tmp_path / family), noise(0)
    found = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")(image, candidate_labels=NAMES)
    expected = torch.tensor([{one["label"]: one["score"] for one in found}[name] for name in NAMES])
    logits = full_logits(folder, NAMES, image)
    scores = logits.softmax(-1) if family == "clip" else logits.sigmoid()
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    assert expected.std() > 1e-3  # the classes differ


@pytest.mark.parametrize("family", ["open_clip", "open_clip_bias"])
def test_full_equals_open_clip(family, tmp_path):
    import open_clip

    folder, image = vlm_cases.MAKERS[family](tmp_path / family), noise(0)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    texts = open_clip.get_tokenizer(f"local-dir:{folder}")([TEMPLATE.format(name) for name in NAMES])
    with torch.no_grad():
        of_image, of_text = (
            torch.nn.functional.normalize(z, dim=-1)
            for z in (model.eval().encode_image(preprocess(image)[None]), model.encode_text(texts))
        )
        expected = model.logit_scale.exp() * of_image @ of_text.t() + (0 if model.logit_bias is None else model.logit_bias)
    torch.testing.assert_close(full_logits(folder, NAMES, image), expected[0], atol=1e-5, rtol=1e-4)


def test_a_prediction_is_the_most_confident_of_both_views_and_follows_the_order_of_the_classes(clip):
    image, box = noise(3, (50, 90)), [10, 5, 60, 45]
    predict = ZeroShotL2R2.from_pretrained(str(clip), NAMES, localizer="center")
    given = predict(image, boxes=[box]).objects[0]
    spec = predict.model.view_spec
    full = predict.model(make_views([image], None, spec, branches=("full",)).full)[0].softmax(-1)
    fg = make_views([image], torch.tensor([box], dtype=torch.float), spec, branches=("fg",)).fg
    fg = predict.model(fg)[0].softmax(-1)
    best = fg if fg.max() >= full.max() else full
    assert given.label == NAMES[int(best.argmax())] and given.score == pytest.approx(float(best.max()), abs=1e-5)
    assert predict(image).objects[0].box == (22.5, 12.5, 67.5, 37.5)  # the localizer's
    turned = ZeroShotL2R2.from_pretrained(str(clip), NAMES[::-1])(image, boxes=[box]).objects[0]
    assert (turned.label, turned.score) == (given.label, pytest.approx(given.score, abs=1e-6))


def test_templates_and_synonyms_are_averaged_as_embeddings(clip):
    from l2r2_models.zero_shot.towers import load_towers

    templates = ["a {}", "one {} here"]
    predict = ZeroShotL2R2.from_pretrained(str(clip), {"n1": ["cat", "kitten"], "n2": "dog"}, template=templates)
    assert predict.labels == ("n1", "n2")
    texts = load_towers(clip).encode(["a cat", "a kitten", "one cat here", "one kitten here"])
    mean = torch.nn.functional.normalize(torch.nn.functional.normalize(texts, dim=-1).mean(0), dim=0)
    torch.testing.assert_close(predict.model.heads["fg"].prototypes[0], mean, atol=1e-5, rtol=1e-4)


def test_stored_prototypes_are_used_and_a_damaged_file_is_computed_again(clip, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    def prototypes(names=NAMES, template=TEMPLATE):
        return ZeroShotL2R2.from_pretrained(str(clip), names, template=template).model.heads["full"].prototypes

    first = prototypes()
    (file,) = (tmp_path / "cache" / "l2r2" / "prototypes").iterdir()
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    save_file({"prototypes": -first}, file, about)
    assert torch.equal(prototypes(), -first)  # read, not computed
    assert not torch.equal(prototypes(template="a {}"), -first)  # another template is another file
    file.write_bytes(b"damaged")
    assert torch.equal(prototypes(), first)


def test_ten_thousand_classes_are_encoded_in_batches(clip, monkeypatch):
    from l2r2_models.zero_shot import prototypes
    from l2r2_models.zero_shot.prompts import Prompts
    from l2r2_models.zero_shot.towers import load_towers

    towers, sizes = load_towers(clip), []

    def encode(texts):
        sizes.append(len(texts))
        return towers.encode(texts)

    recording = type(towers)(towers.image, encode, towers.scale, towers.bias, towers.views, towers.digest)
    found = prototypes.prototypes_of(recording, Prompts.of([f"{i:04d}" for i in range(10_000)], "{}"))
    assert found.shape == (10_000, 24) and sum(sizes) == 10_000 and max(sizes) <= prototypes.BATCH
    alone = torch.nn.functional.normalize(towers.encode(["9999"]), dim=-1)[0]
    torch.testing.assert_close(found[9999], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "template", "message"),
    [
        (["cat", "dog", "cat"], TEMPLATE, '"cat" is listed twice'),
        (["cat", " ", "dog"], TEMPLATE, "class 2 has an empty name"),
        ({"a": "cat", "b": ["dog", "cat"]}, TEMPLATE, 'the name "cat" is listed twice'),
        ({"a": "cat", "b": []}, TEMPLATE, "empty name"),
        (["cat"], TEMPLATE, "two or more classes"),
        (["cat", "dog"], "a photo", "has no {} for the class name"),
        (["cat", "dog"], [], "templates are empty"),
    ],
)
def test_invalid_names_and_templates_are_refused(clip, names, template, message):
    with pytest.raises(L2R2Error, match=message):
        ZeroShotL2R2.from_pretrained(str(clip), names, template=template)


def test_a_source_names_its_options(clip, data, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"vulpes": ["red fox", "fox"], "felis": "cat"}))
    (tmp_path / "templates.txt").write_text("a {}\n\nthe {} & co\n")
    more = f"&templates={tmp_path / 'templates.txt'}&fusion=average&margin=0.1"
    spec = ZeroShotSpec.parse(f"vlm:{clip}?names={tmp_path / 'map.json'}{more}")
    assert spec.prompts.of_class(0) == ("a red fox", "a fox", "the red fox & co", "the fox & co")
    assert (spec.fusion, spec.views) == ("average", {"margin": 0.1})
    assert ZeroShotSpec.parse(f"vlm:{clip}?names={data}").prompts.labels == tuple(sorted(NAMES))  # a data set's classes
    assert ZeroShotSpec.parse(source(clip, data, "&template=50%25 {}")).prompts.of_class(1) == ("50% cat",)
    for wrong, message in (
        (f"vlm:{clip}", "needs a model and its class names"),
        (source(clip, data, "&nams=x"), 'unknown option "nams"'),
        (source(clip, data, "&margin=wide"), "margin must be a number"),
        (source(clip, data, "&template={}&templates=x"), "use one or the other"),
        (source(clip, data / "nothing"), "cannot be read"),
    ):
        with pytest.raises(L2R2Error, match=message):
            ZeroShotSpec.parse(wrong)


def test_what_is_not_a_model_is_refused_by_name(data, tmp_path):
    with pytest.raises(L2R2Error, match="is not a vision-language model"):
        load_checkpoint(source(data, data))
    pickled = vlm_cases.open_clip(tmp_path / "pickled")
    (pickled / "open_clip_model.safetensors").rename(pickled / "open_clip_pytorch_model.bin")
    with pytest.raises(L2R2Error, match="pickled weights are never loaded"):
        load_checkpoint(source(pickled, data))
    damaged = vlm_cases.open_clip(tmp_path / "damaged")
    (damaged / "open_clip_model.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(L2R2Error, match="cannot be loaded"):
        load_checkpoint(source(damaged, data))


def test_evaluate_gives_the_rows_of_the_paper(clip, data):
    model = source(clip, data)
    judged = judge_run(model, data, "test", fit_split="val", workers=0)
    rows = judged.outputs
    assert {"full", "fg", "bg", "center crop", "max_confidence (fg + full)", "max_confidence (fg + bg)"} <= set(rows)
    assert judged.answer == "fused: max_confidence"
    torch.testing.assert_close(rows[judged.answer], rows["max_confidence (fg + full)"])
    (name,) = [n for n in rows if n.startswith("full - ")]
    strength = float(name.split()[2])
    torch.testing.assert_close(rows[name], debiased(judged.data, strength))
    by_hand = rows["full"].softmax(-1).log() - strength * rows["bg"].softmax(-1).log()
    assert torch.equal(rows[name].argmax(-1), by_hand.argmax(-1))
    predict = l2r2_models.Predictor.from_pretrained(model, localizer="center")
    image = judged.data.table.rows[0].path
    fg = predict.keeping_logits()(image).objects[0].logits["fg"]
    torch.testing.assert_close(rows["center crop"][0], torch.as_tensor(fg), atol=1e-3, rtol=1e-3)
    without = judge_run(model, data, "test", workers=0)
    assert not any(n.startswith("full - ") for n in without.outputs)  # its strength needs held-out images


def test_a_fusion_is_fitted_for_a_zero_shot_model_and_used_by_name(clip, data, tmp_path):
    model, file = source(clip, data), tmp_path / "fitted.safetensors"
    fit_run(model, data, "val", method="max_scaled_confidence", out=file, backgrounds="plain")
    fitted = load_checkpoint(f"{model}&fusion={file}")
    assert fitted.model.fusion.name == "max_scaled_confidence"
    fresh = create_fusion("max_scaled_confidence", ("full", "fg"), 3)
    assert not torch.equal(fitted.model.fusion.temperatures, fresh.temperatures)
    assert fitted.digest != load_checkpoint(model).digest
    (tmp_path / "other.txt").write_text("dog\ncat\nred fox")
    with pytest.raises(L2R2Error, match="fitted for other classes"):
        load_checkpoint(f"vlm:{clip}?names={tmp_path / 'other.txt'}&fusion={file}")
    with pytest.raises(L2R2Error, match="must be fitted first"):
        load_checkpoint(f"{model}&fusion=concat_mlp")
    with pytest.raises(L2R2Error, match="pass -o FILE"):
        fit_run(model, data, "val")
    file.write_bytes(b"damaged")
    with pytest.raises(L2R2Error, match="is not a fusion"):
        load_checkpoint(f"{model}&fusion={file}")


def test_audit_and_explain_take_a_zero_shot_model(clip, data, tmp_path):
    audited = run_audit(source(clip, data), data, split="test", limit=4, work=tmp_path / "work", workers=0)
    assert list(audited.result.answers) == ["full", "fg", "fused"]
    explain = Explainer.from_pretrained(source(clip, data), numbers=False)
    assert explain.method == "ig"
    assert explain(data / "0.png", boxes=[[0, 4, 30, 40]]).maps["fg"].sum() > 0
    with pytest.raises(L2R2Error, match="choose ig or occlusion"):
        Explainer.from_pretrained(source(clip, data), method="gradcam", numbers=False)(data / "0.png")
    with pytest.raises(L2R2Error, match="do not pass --labels"):
        run_audit(source(clip, data), data, labels=data / "names.txt")


def test_the_commands_take_a_zero_shot_model(clip, data, tmp_path):
    run = CliRunner().invoke
    predicted = run(app, ["predict", source(clip, data), str(data), "-o", str(tmp_path / "p.json"), "--split", "test"])
    assert predicted.exit_code == 0, predicted.output
    images = json.loads((tmp_path / "p.json").read_text())["images"]
    assert len(images) == 12 and {o["label"] for image in images for o in image["objects"]} <= set(NAMES)
    timed = run(app, ["benchmark", source(clip, data), str(data / "0.png"), "--json"])
    assert timed.exit_code == 0, timed.output
    refused = run(app, ["fuse", source(clip, data), str(data)])
    assert refused.exit_code == 1 and "-o FILE.safetensors" in str(refused.exception)
