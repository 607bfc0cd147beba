"""A Predictor with a localizer: by a spec, by its box head in one full pass, by prompting with the likely classes."""

import json

import pytest
import torch
from conftest import sentence, write_run

from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.boxes.detections import ViewMap
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.table import read_table
from l2r2_models.images import load_image
from l2r2_models.localize import create_localizer
from l2r2_models.localize.localize_files import localize_to_file
from l2r2_models.localize.topk import topk_prompts
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.views import make_views


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("head") / "run", box_head=True)


@pytest.fixture
def paths(dataset):
    return [row.path for row in read_table(dataset).of_split("test").rows]


def test_boxes_of_the_localizer_give_the_predictions_of_a_box_file(run, paths, tmp_path):
    spec = "center?share=0.7"
    localize_to_file(create_localizer(spec), paths, tmp_path / "boxes.json")
    inputs = gather(paths, tmp_path / "boxes.json")
    by_file = list(Predictor.from_pretrained(run, device="cpu").predict_files(inputs.paths, inputs.entries))
    on_the_way = list(Predictor.from_pretrained(run, device="cpu", localizer=spec, batch_size=5).predict_files(paths))
    for a, b in zip(by_file, on_the_way):
        assert a.file == b.file and a.label == b.label and a.objects[0].source == b.objects[0].source == "fused"
        assert a.objects[0].box == pytest.approx(b.objects[0].box, abs=0.01)
        assert a.objects[0].score == pytest.approx(b.objects[0].score, abs=1e-3)
    given = Predictor.from_pretrained(run, device="cpu", localizer=spec)(paths[0], [[1, 2, 30, 40]])
    assert given.objects[0].box == (1, 2, 30, 40)  # boxes that are given are used


def test_the_head_needs_one_full_pass_and_cuts_from_the_original(headed, paths):
    predictor = Predictor.from_pretrained(headed, device="cpu", localizer="head", box_threshold=0.0)
    model, image = predictor.model, load_image(paths[0])
    views = make_views([image], None, model.view_spec, branches=("full",))
    with torch.no_grad():
        found = model.locate(views.full)
        box = ViewMap((0, 0, 60, 40), (32, 32)).boxes_to_image(found.boxes.clamp(0, 1) * 32).clamp(min=0)
        box = box.minimum(torch.tensor([60, 40, 60, 40]))
        cut = make_views([image], box, model.view_spec)
        out = model.forward_views(cut.full, cut.fg, cut.has_fg)
    seen = []
    model.backbone.conv1.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    (answer,) = predictor(paths[0]).objects
    assert answer.box == pytest.approx(box[0].tolist(), abs=0.02)
    assert answer.box_score == pytest.approx(found.objectness.sigmoid().item(), abs=1e-4)
    for said, logits in ((answer, out.fused), (answer.full, out.full), (answer.fg, out.fg)):
        assert said.score == pytest.approx(logits.softmax(-1).max().item(), abs=1e-4)
    assert seen == [1, 1]  # the whole image once, the object once
    together = list(Predictor.from_pretrained(headed, device="cpu", localizer="head", box_threshold=0.0).predict_files(paths))
    for path, prediction in zip(paths, together):
        assert prediction.objects[0].box == pytest.approx(predictor(path).objects[0].box, abs=0.02)


def test_with_low_objectness_the_whole_image_is_classified(headed, paths):
    sure = Predictor.from_pretrained(headed, device="cpu", localizer="head", box_threshold=1.0)
    (answer,) = sure(paths[0]).objects
    assert answer.source == "full" and "no box reaches the score 1" in answer.reason
    assert (answer.label, answer.score) == (answer.full.label, answer.full.score)
    with pytest.raises(L2R2Error, match="has no box head"):
        Predictor.from_pretrained(write_run(headed.parent / "plain"), localizer="head")


def test_the_head_of_a_run_makes_box_files_too(headed, paths, tmp_path):
    localizer = create_localizer(f"head:{headed}", device="cpu")
    report = localize_to_file(localizer, paths, tmp_path / "boxes.json", batch_size=5)
    assert report.with_box == len(paths) and localizer.info["weights"] == hub.load_checkpoint(headed).digest
    (alone,) = localizer([load_image(paths[7])])
    stored = report.entries[str(paths[7])].detections((40, 60), "x")
    assert stored.boxes[0].tolist() == pytest.approx(alone.boxes[0].tolist(), abs=0.01)


def test_a_localizer_that_fails_is_named_and_the_others_go_on(run, paths, monkeypatch):
    predictor = Predictor.from_pretrained(run, device="cpu", localizer="full")
    find = type(predictor.localizer).find

    def fails(self, images, names, prompts):
        if str(paths[3]) in names:
            raise RuntimeError("out of memory")
        return find(self, images, names, prompts)

    monkeypatch.setattr(type(predictor.localizer), "find", fails)
    answers = [p.objects[0] for p in predictor.predict_files(paths)]
    assert [a.source for a in answers] == ["full" if i == 3 else "fused" for i in range(len(paths))]
    assert "the localizer failed (out of memory)" in answers[3].reason


def test_what_the_localizer_failed_on_is_tried_again(run, paths, tmp_path, monkeypatch):
    predictor, inputs, out = Predictor.from_pretrained(run, device="cpu", localizer="full"), gather(paths), tmp_path / "out.json"
    kind, find = type(predictor.localizer), type(predictor.localizer).find
    seen, broken = [], [paths[3]]

    def fails(self, images, names, prompts):
        seen.extend(names)
        if any(str(path) in names for path in broken):
            raise RuntimeError("out of memory")
        return find(self, images, names, prompts)

    monkeypatch.setattr(kind, "find", fails)
    first = predict_to_file(predictor, inputs, out)
    assert len(first.localizer_failures) == 1 and not first.failures
    seen.clear()
    broken.clear()
    second = predict_to_file(predictor, inputs, out)
    assert seen == [str(paths[3])] and second.kept == len(paths) - 1
    assert not second.localizer_failures and second.images[3]["objects"][0]["source"] == "fused"


def test_a_failing_localizer_is_reported_on_the_command_line(l2r2, headed, dataset, tmp_path, tiny):
    base = ["predict", headed, dataset, "--split", "test", "-o"]
    forgotten = sentence(l2r2(*base, tmp_path / "none.json", "--localizer", f"owlv2:{tiny('owlv2')}"))
    assert "needs a prompt" in forgotten and not (tmp_path / "none.json").exists()
    checkpoint = hub.load_checkpoint(headed)
    torch.nn.init.constant_(checkpoint.model.box_head.out.bias, float("nan"))
    hub.save_checkpoint(checkpoint.model, tmp_path / "nan", checkpoint.labels)
    base[1] = tmp_path / "nan"
    failed = l2r2(*base, tmp_path / "failed.json", "--localizer", "head")
    assert failed.stderr.count("the localizer failed on 12 of 12 images") == 1
    assert "(the boxes of the box head are not finite" in failed.stderr
    assert "12 from the whole image (12 because the localizer failed)" in failed.stdout and failed.returncode == 1
    boxes = {"images": [{"file": "test_003.png", "failure": "out of memory"}], "info": {}, "detection_categories": {}}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    given = l2r2(*base, tmp_path / "given.json", "--boxes", tmp_path / "boxes.json")
    assert "failed on 1 of 12 images" in given.stderr and "out of memory" in given.stderr


@pytest.mark.parametrize("branches", [("full", "fg"), ("full", "fg", "bg")])
def test_top_k_prompts_are_scored_as_the_paper_says(tiny, paths, tmp_path, branches):
    """A loop over images and classes, one at a time."""
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run", branches=branches))
    localizer = create_localizer(f"owlv2:{tiny('owlv2')}?threshold=0", device="cpu")
    model, labels, threshold = checkpoint.model, checkpoint.labels, 0.52
    images = [load_image(path) for path in paths[:4]]
    found = topk_prompts(model, labels, localizer, images, 2, threshold)
    boxless = 0
    for i, image in enumerate(images):
        with torch.no_grad():
            full = model.forward_views(make_views([image], None, model.view_spec, branches=("full",)).full).full[0]
            for j, c in enumerate(full.argsort(descending=True)[:2].tolist()):
                (detections,) = localizer([image], prompts=[labels[c]])
                sure = detections.above(threshold)
                boxless += not len(sure)
                box = sure.boxes[:1] if len(sure) else torch.full((1, 4), float("nan"))
                views = make_views([image], box, model.view_spec, branches=branches[1:])
                out = model.forward_branches(**{b: getattr(views, b) for b in branches[1:]})
                expected = torch.stack([full[c], *(out[b][0, c] for b in branches[1:])]).mean()
                assert found.classes[i, j] == c and found.scores[i, j].item() == pytest.approx(expected.item(), abs=1e-4)
    assert 0 < boxless < 8  # both ways are taken
    predictor = Predictor(checkpoint, localizer=localizer, topk_prompts=2, box_threshold=threshold, device="cpu")
    for i, prediction in enumerate(predictor.predict_files(paths[:4])):
        if found.boxes[i].isfinite().any():
            best = found.scores[i].argmax()
            assert prediction.label == labels[found.classes[i, best]] and "by the whole image" in prediction.objects[0].reason
        else:
            assert prediction.objects[0].source == "full" and "no object was found" in prediction.objects[0].reason


def test_top_k_prompts_go_on_where_the_localizer_fails_on_one_image(run, paths, tiny, monkeypatch):
    predictor = Predictor.from_pretrained(run, device="cpu", localizer=f"owlv2:{tiny('owlv2')}?threshold=0", topk_prompts=2)
    kind, calls = type(predictor.localizer), []
    by_prompt = kind.by_prompt

    def fails(self, images, prompts):
        calls.append(len(images))
        if len(images) > 1 or len(calls) == 4:
            raise L2R2Error("the localizer gives nothing but NaN")
        return by_prompt(self, images, prompts)

    monkeypatch.setattr(kind, "by_prompt", fails)
    said = [prediction.objects[0].reason for prediction in predictor.predict_files(paths[:4])]
    assert ["the localizer failed (the localizer gives nothing" in reason for reason in said] == [False, False, True, False]


def test_top_k_prompts_need_what_they_need(run, tiny, tmp_path):
    with pytest.raises(L2R2Error, match="a localizer that takes prompts"):
        Predictor.from_pretrained(run, localizer="center", topk_prompts=2)
    with pytest.raises(L2R2Error, match="topk_prompts must be at least 1"):
        Predictor.from_pretrained(run, topk_prompts=2)
    with pytest.raises(L2R2Error, match="need the branches full and fg"):
        plain = write_run(tmp_path / "plain", branches=("full",))
        Predictor.from_pretrained(plain, localizer=f"owlv2:{tiny('owlv2')}", topk_prompts=2)


def test_predict_localizes_on_the_command_line(l2r2, headed, dataset, tmp_path, tiny):
    out = tmp_path / "out.json"
    base = ["predict", headed, dataset, "--split", "test", "-o", out]
    assert l2r2(*base, "--localizer", "center").returncode == 0
    data = json.loads(out.read_text())
    assert data["localizer"]["localizer"] == "center" and data["images"][0]["objects"][0]["box"] == [15, 10, 45, 30]
    assert "made with a different localizer" in sentence(l2r2(*base, "--localizer", "head"))
    (tmp_path / "boxes.json").write_text("{}")
    assert l2r2(*base, "--localizer", "head", "--boxes", tmp_path / "boxes.json").returncode == 2
    topk = ["--localizer", f"owlv2:{tiny('owlv2')}?threshold=0", "--topk-prompts", 2]
    assert l2r2(*base[:-1], tmp_path / "topk.json", *topk).returncode == 0


def test_predict_says_which_localizer_a_model_is_meant_for(l2r2, dataset, tmp_path):
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run"))
    hub.save_checkpoint(checkpoint.model, tmp_path / "run", checkpoint.labels, localizer={"spec": "center?share=0.6"})
    base = ["predict", tmp_path / "run", dataset / "images", "-o", tmp_path / "out.json"]
    assert "meant for boxes from --localizer center?share=0.6" in l2r2(*base).stderr
    again = l2r2(*base[:-1], tmp_path / "other.json", "--localizer", "center?share=0.6")
    assert again.returncode == 0 and "meant for" not in again.stderr


def test_each_box_is_seen_through_its_own_mask(tiny, tmp_path, pictures):
    """SAM's masks reach the views of a model that erases the background, box by box."""
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run", fg_mode="masked_crop"))
    model = checkpoint.model
    model.view_spec = ViewSpec.from_dict({**model.view_spec.to_dict(), "fg_mode": "masked_crop"})
    boxes = {"a.png": [[2, 3, 40, 36], [20, 1, 58, 30]]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    pictures[0].save(tmp_path / "a.png")
    spec = f"boxes:{tmp_path / 'boxes.json'}?masks=sam2:{tiny('sam2')}"
    prediction = Predictor(checkpoint, localizer=spec, device="cpu")(tmp_path / "a.png")
    (found,) = create_localizer(spec, device="cpu")(pictures[:1], names=["a.png"])
    with torch.no_grad():
        views = make_views(
            pictures[:1], found.boxes, model.view_spec, image_index=torch.zeros(2, dtype=torch.long), masks=list(found.masks)
        )
        fg = model.forward_views(**views.inputs()).fg.softmax(-1).amax(-1)
        bare = make_views(pictures[:1], found.boxes, model.view_spec, image_index=torch.zeros(2, dtype=torch.long))
    assert [o.fg.score for o in prediction.objects] == pytest.approx(fg.tolist(), abs=1e-4)
    assert not torch.equal(views.fg[0], bare.fg[0]) and not torch.equal(found.masks[0], found.masks[1])
