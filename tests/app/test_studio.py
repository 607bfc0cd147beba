"""What the page shows, without a browser: boxes, predictions by branch, saliency, other backgrounds, text of strangers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from app_cases import BOXES, photo, write_backgrounds
from audit_cases import GROUNDS, OBJECTS
from explain_cases import write_spots
from html_pages import EVIL, Page
from PIL import Image

from l2r2_models import Explainer, L2R2Error, Predictor
from l2r2_models.app import markup
from l2r2_models.app.handlers import Handlers
from l2r2_models.app.studio import Photo, Studio
from l2r2_models.checkpoints.checkpoint import save_checkpoint
from l2r2_models.fusion import MetadataPrior
from l2r2_models.predict.rules import Rules

COLORS_OF_SPOTS = tuple(OBJECTS)  # the classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def studio(folder):
    run = write_spots(folder / "run")
    return Studio(Explainer.from_pretrained(run, numbers=False), write_backgrounds(folder / "grounds"), max_pixels=50_000)


@pytest.fixture
def seen():
    return Photo(photo(), "photo.png")


def boxed(studio, seen, name):
    """The photo with a box on one of its objects."""
    return studio.write(seen, "{}, {}, {}, {}".format(*BOXES[name]))


def labels(look):
    """The first class of each output."""
    return {name: found[0].label for name, found in look.answers.items()}


def alike(answers, others):
    """The page keeps logits of five decimals."""
    pairs = zip(answers, others, strict=True)
    return all(one.label == other.label and one.score == pytest.approx(other.score, abs=1e-4) for one, other in pairs)


def test_the_box_decides_what_fg_says(studio, seen):
    red, blue = (studio.look(boxed(studio, seen, name)) for name in ("red", "blue"))
    assert labels(red)["full"] == labels(blue)["full"] == "green"
    assert labels(red)["fg"] == "red" and labels(blue)["fg"] == "blue"
    predicted = Predictor.from_pretrained(studio.predictor.checkpoint.name)(photo(), [BOXES["red"]]).objects[0]
    assert red.reason == predicted.reason and alike(red.answers["fused"], predicted.top)
    for name in ("full", "fg"):
        first, best = red.answers[name][0], getattr(predicted, name)
        assert first.label == best.label and first.score == pytest.approx(best.score, abs=1e-3)
        assert sum(one.score for one in red.answers[name]) == pytest.approx(1, abs=1e-4)  # 3 classes


def test_without_a_box_the_whole_image_answers(studio, seen):
    look = studio.look(studio.whole(boxed(studio, seen, "red")))
    assert look.answers["full"] == look.answers["fused"] and len(look.answers["full"]) == 3
    assert labels(look) == {"full": "green", "fused": "green"} and look.reason.startswith("no box was given")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("20, 30, 80, 90", BOXES["red"]),
        ("80 90 20 30", BOXES["red"]),
        ("-5, 0, 1e6, 50", (0, 0, 240, 50)),
        (" ", None),
    ],
)
def test_a_box_can_be_typed(studio, seen, text, box):
    assert studio.write(seen, text).box == box


@pytest.mark.parametrize(
    "text", ["1, 2, 3", "a, b, c, d", "nan, 0, 9, 9", "500, 500, 600, 600", "5, 5, 5, 5", "inf 0 0 0", "1 2 3 4 5"]
)
def test_a_box_that_is_none_is_one_sentence(studio, seen, text):
    with pytest.raises(L2R2Error, match=r"^(A box is four numbers|The box covers no pixel)"):
        studio.write(seen, text)


@pytest.mark.parametrize("sent", [None, 3, "0,0,1,1", [0, 0, 1], [0, 0, 1, None], {"x": 1}, [float("nan")] * 4])
def test_what_a_browser_must_not_send_is_one_sentence(studio, seen, sent):
    with pytest.raises(L2R2Error):
        studio.draw(seen, sent)


def test_a_box_is_drawn_relative_to_the_photo(studio, seen):
    assert studio.draw(seen, [80 / 240, 90 / 160, 20 / 240, 30 / 160]).box == BOXES["red"]


def test_another_background_changes_full_and_not_fg(studio, seen, tmp_path):
    drawn = boxed(studio, seen, "red")
    assert studio.look_elsewhere(drawn) is None
    moved = studio.look_elsewhere(studio.put_on(drawn, 0))
    assert labels(moved)["full"] == "blue" and labels(moved)["fg"] == "red"
    pixels = np.asarray(moved.image)
    assert pixels.shape == (160, 240, 3) and tuple(pixels[5, 230]) == GROUNDS["blue"]
    assert (pixels[40:80, 30:70] == np.asarray(photo())[40:80, 30:70]).all()
    assert studio.look_elsewhere(studio.put_back(studio.put_on(drawn, 0))) is None
    with pytest.raises(L2R2Error, match="draw a box"):
        studio.look_elsewhere(studio.put_on(seen, 0))
    for index in (3, -1, None, str(tmp_path / "secret.png")):  # what a browser sends
        with pytest.raises(L2R2Error, match="3 backgrounds"):
            studio.put_on(drawn, index)


def test_a_second_photo_can_be_the_background(studio, seen, tmp_path):
    Image.new("RGB", (50, 90), GROUNDS["red"]).save(tmp_path / "other.png")
    moved = studio.look_elsewhere(studio.put_on_photo(boxed(studio, seen, "blue"), str(tmp_path / "other.png")))
    assert labels(moved)["full"] == "red" and labels(moved)["fg"] == "blue"


def test_saliency_of_every_output(studio, seen):
    look = studio.look(boxed(studio, seen, "red"), saliency=True)
    titles = [picture.title for picture in look.maps]
    assert [t.split(":")[0] for t in titles] == ["full", "what fg sees", "fg", "fg's map on the image", "fused"]
    assert [p.title.split(":")[0] for p in studio.look(seen, saliency=True).maps] == ["full", "fused"]
    assert studio.look(seen).maps == []


def test_a_prior_corrects_the_fused_prediction_by_the_metadata(folder, seen):
    rows = [{"site": site, "month": month} for site, month in [("a", "2"), ("a", "10"), ("b", "2")]] * 40
    prior = MetadataPrior.of_rows(COLORS_OF_SPOTS, ["red", "red", "blue"] * 40, rows, ["site", "month:12"])
    studio = Studio(Explainer.from_pretrained(folder / "run", numbers=False), prior=prior)
    assert studio.columns == {"site": ["a", "b"], "month": ["2", "10"]}
    drawn = boxed(studio, seen, "red")
    plain, known = studio.look(drawn), studio.look(studio.describe(drawn, "b", ""))
    assert known.answers["full"] == plain.answers["full"] and known.answers["fg"] == plain.answers["fg"]
    wanted = prior(torch.tensor([[math.log(a.score) for a in by_label(plain)]]), [{"site": "b"}])[0].exp()
    assert [a.score for a in by_label(known)] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert studio.look(studio.describe(studio.describe(drawn, "b", ""), "", "")) == plain
    nowhere = studio.look(studio.whole(studio.describe(drawn, "b", "2")))
    assert labels(nowhere)["full"] == "green" and nowhere.answers["fused"] != nowhere.answers["full"]
    for values in (("c", ""), ("a",), (None, "2"), (["a"], "2")):
        with pytest.raises(L2R2Error, match="no such value"):
            studio.describe(drawn, *values)


def test_the_saliency_is_that_of_the_corrected_prediction(folder, seen):
    rows = [{"site": site} for site in "ab"] * 100
    prior = MetadataPrior.of_rows(COLORS_OF_SPOTS, ["red", "blue"] * 100, rows, ["site"], smoothing=0.01)
    studio = Studio(Explainer.from_pretrained(folder / "run", numbers=False), prior=prior)
    known = studio.describe(boxed(studio, seen, "red"), "b")
    look = studio.look(known, saliency=True)
    assert labels(look)["fg"] == "red" and labels(look)["fused"] == "blue"
    assert look.maps[-1].title.startswith(f"fused: blue {100 * look.answers['fused'][0].score:.0f} %")


def test_only_possible_classes_are_shown_and_a_group_is_named(folder, seen):
    explainer = Explainer.from_pretrained(folder / "run", numbers=False)
    rules = Rules(COLORS_OF_SPOTS, classes=("red", "blue"))
    studio = Studio(explainer.with_rules(rules))
    for one in (seen, boxed(studio, seen, "red")):
        look = studio.look(one, saliency=True)
        assert all({one.label for one in found} == {"red", "blue"} for found in look.answers.values())
        assert all(sum(one.score for one in found) == pytest.approx(1, abs=1e-4) for found in look.answers.values())
        assert not any("green" in picture.title for picture in look.maps) and look.named == ""
    groups = {"red": ("dim",), "blue": ("dim",), "green": ("bright",)}
    studio = Studio(explainer.with_rules(replace(rules, ancestors=groups, rollup=0.9999)))
    look = studio.look(boxed(studio, seen, "red"))
    assert look.named == "dim" and "Prediction: dim" in markup.answers(look) and look.answers["fused"][0].label != "dim"


def by_label(look):
    return sorted(look.answers["fused"], key=lambda one: COLORS_OF_SPOTS.index(one.label))


@pytest.fixture(scope="module")
def ifam(folder):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_parts": 3}
    model = timm.create_model("ifam_vit_tiny_patch16_224", num_classes=3, **small)
    save_checkpoint(model, folder / "ifam", ["a", "b", "c"])
    return Studio(Explainer.from_pretrained(folder / "ifam", numbers=False))


def test_an_ifam_model_can_do_without_parts(ifam, seen):
    used = ifam.use_parts(seen, ["0", "2"])
    with_all, without = ifam.look(seen), ifam.look(used)
    assert used.dropped == (1,) and with_all.answers != without.answers
    predictor = Predictor.from_pretrained(ifam.predictor.checkpoint.name)
    for look, dropped in ((with_all, ()), (without, (1,))):
        with predictor.model.intervened(dropped):
            assert alike(look.answers["fused"], predictor(photo()).objects[0].top)
    assert not np.array_equal(with_all.parts, without.parts)  # the patches of part 1 are dark
    assert not ifam.ifam.interventions() and ifam.look(ifam.use_parts(used, ["0", "1", "2"])) == with_all
    moved = ifam.look_elsewhere(replace(boxed(ifam, used, "red"), background=torch.zeros(9, 9, 3, dtype=torch.uint8)))
    assert moved is not None and moved.parts is not None
    html = markup.stage(seen, finds_object=True) + markup.maps(without)
    assert "finds the object itself" in html and "Parts that the model finds" in html


@pytest.mark.parametrize("sent", [[], ["3"], [0], None, "0"])
def test_parts_that_do_not_exist_are_one_sentence(ifam, studio, seen, sent):
    for one in (ifam, studio):
        with pytest.raises(L2R2Error, match=r"Keep at least one of the [30] parts"):
            one.use_parts(seen, sent)


def test_files_that_are_no_photos(studio, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    photo(size=(300, 240)).save(tmp_path / "large.png")
    for name, words in (("text.png", "text.png: is not an image"), ("large.png", "more than the limit of 50,000")):
        with pytest.raises(L2R2Error, match=words):
            studio.open(None, str(tmp_path / name))


def test_the_localizer_finds_the_objects_when_asked(folder, tmp_path):
    studio = Studio(Explainer.from_pretrained(folder / "run", numbers=False, localizer="center?share=0.25"))
    photo().save(tmp_path / "a.png")
    opened = studio.find(studio.open(None, str(tmp_path / "a.png")))
    assert opened.box == (90, 60, 150, 100) and opened.name == "a.png"
    assert studio.find(studio.whole(opened)).box == opened.box
    assert labels(studio.look(studio.whole(opened)))["fused"] == "green"  # the localizer is not asked again
    several = replace(opened, boxes=tuple(BOXES.values()), scores=(0.9, 0.3))
    assert labels(studio.look(several))["fg"] == "red" and labels(studio.look(studio.choose(several, 1)))["fg"] == "blue"
    assert studio.choose(several, 7).chosen == 1


def test_a_photo_in_which_nothing_is_found_is_shown_with_one_sentence(folder, tmp_path):
    (tmp_path / "boxes.json").write_text('{"other.png": [[0, 0, 9, 9]]}')
    studio = Studio(Explainer.from_pretrained(folder / "run", numbers=False, localizer=f"boxes:{tmp_path / 'boxes.json'}"))
    with pytest.raises(L2R2Error, match=r"^No object was found; draw a box around the object\.$"):
        studio.find(Photo(photo(), "photo.png"))
    (tmp_path / "upload").mkdir()
    photo().save(tmp_path / "upload" / "photo.png")
    handler = Handlers(studio).after_upload(studio.open, studio.find)
    shown, notice, *_ = handler(Photo(photo("red"), "before.png"), False, str(tmp_path / "upload" / "photo.png"))
    assert shown.name == "photo.png" and "No object was found" in notice and not (tmp_path / "upload").exists()


def test_a_folder_of_backgrounds(folder, studio, tmp_path):
    assert [name for name, _ in studio.backgrounds] == ["blue.png", "green.png", "red.png"]
    many = tmp_path / "many"
    many.mkdir()
    for i in range(30):
        Image.new("RGB", (4, 4)).save(many / f"{i:02d}.png")
    (many / "00.png").write_text("damaged")
    found = Studio(studio.explainer, many).backgrounds
    assert len(found) == 23 and found[-1][0] == "28.png"
    for path in many.iterdir():
        path.write_text("damaged")
    with pytest.raises(L2R2Error, match="no image that can be read"):
        Studio(studio.explainer, many)


def test_text_of_strangers_is_escaped(studio, seen):
    drawn = replace(studio.put_on(boxed(studio, seen, "red"), 0), name=EVIL)
    look, moved = studio.look(drawn, saliency=True), studio.look_elsewhere(drawn)
    look.answers["fused"] = [replace(look.answers["fused"][0], label=EVIL)]
    html = [
        markup.heading(EVIL, Rules((EVIL,))),
        markup.stage(drawn),
        markup.answers(replace(look, reason=EVIL), EVIL),
        markup.maps(look),
        markup.elsewhere(moved, look, drawn),
        markup.notice(EVIL),
        markup.picker(studio),
        markup.stage(None),
    ]
    page = Page("\n".join(html))
    assert "script" not in page.tags and all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    assert EVIL in page.words and "still red" in page.words and "blue instead of green" in page.words


def test_the_box_stays_on_the_object_at_any_width(studio, seen):
    html = markup.stage(boxed(studio, seen, "red"))
    assert "left:8.333%;top:18.750%;width:25.000%;height:37.500%" in html
