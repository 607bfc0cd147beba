"""Metrics of the audit compared with naive loops, and properties of the changed images."""

import numpy as np
import pytest
import torch

from l2r2_models.audit.metrics import Estimate, foreground_sensitivity, measures
from l2r2_models.audit.perturbations import (
    L2_LEVELS,
    STD_LEVELS,
    Donors,
    Subject,
    add_noise,
    intervene,
    noise_pattern,
    plan,
    swap,
)
from l2r2_models.audit.verdict import advice_of, verdict_of
from l2r2_models.evaluate.metrics import bootstrap_interval
from l2r2_models.views import ViewSpec, make_views

NAN = float("nan")


def naive_rfs(fg, bg):
    mean = (fg + bg) / 2
    return 0.0 if mean in (0, 1) else (bg - fg) / (2 * min(mean, 1 - mean))


def test_rfs_is_the_papers_formula():
    steps = [i / 8 for i in range(9)]
    for fg in steps:
        for bg in steps:
            got = float(foreground_sensitivity(torch.tensor(fg), torch.tensor(bg)))
            assert got == pytest.approx(naive_rfs(fg, bg)) and -1 <= got <= 1
            assert (got > 0) == (bg > fg)  # noise on the object hurts more: the object matters more
    assert float(foreground_sensitivity(torch.tensor(0.0), torch.tensor(0.0))) == 0
    assert float(foreground_sensitivity(torch.tensor(1.0), torch.tensor(1.0))) == 0


@pytest.fixture
def answers():
    """Random answers of 40 images under every intervention; some are not made for some images."""
    rng = np.random.default_rng(0)
    right = {name: torch.from_numpy((rng.random(40) < 0.6).astype(np.float64)) for name in plan(3)}
    truth = {name: torch.from_numpy(rng.random(40)) for name in plan(3)}
    right["bg_only_mask"][::2] = NAN
    right["mixed_same"][:3] = NAN
    return right, truth


def test_every_measure_is_what_a_naive_loop_finds(answers):
    right, truth = answers
    groups = ["a" if i < 10 else "b" for i in range(40)]
    found = {name: f.value for name, f in measures(right, truth, torch.arange(40), groups, draws=20).items()}
    r = {name: values.tolist() for name, values in right.items()}
    mean = lambda values: sum(values) / len(values)  # noqa: E731

    assert found["accuracy"] == pytest.approx(mean(r["original"]))
    assert found["bg_only_mask"] == pytest.approx(mean(r["bg_only_mask"][1::2]))
    assert found["drop_bg_only_mask"] == pytest.approx(1 - mean(r["bg_only_mask"][1::2]) / mean(r["original"][1::2]))
    random = [mean([r[f"mixed_rand_{k}"][i] for k in range(3)]) for i in range(40)]
    assert found["mixed_rand"] == pytest.approx(mean(random))
    assert found["swap_loss"] == pytest.approx(mean(r["original"]) - mean(random))
    assert found["bg_gap"] == pytest.approx(mean(r["mixed_same"][3:]) - mean(random[3:]))  # on the same images
    never_fooled = [float(all(r[f"mixed_rand_{k}"][i] for k in range(3))) for i in range(40)]
    assert found["challenge_upper_bound"] == pytest.approx(mean(never_fooled)) and "challenge" not in found
    assert found["worst_group"] == pytest.approx(min(mean(r["original"][:10]), mean(r["original"][10:])))
    for kind, levels in (("", STD_LEVELS), ("l2_", L2_LEVELS)):
        fg, bg = (mean([mean(r[f"noise_{kind}{w}_{level}"]) for level in levels]) for w in ("fg", "bg"))
        name = "rfs_l2" if kind else "rfs"
        assert found[name] == pytest.approx(naive_rfs(fg, bg))
        each = []
        for i in range(40):
            of_levels = [[float(truth[f"noise_{kind}{w}_{level}"][i]) for w in ("fg", "bg")] for level in levels]
            each.append(mean([naive_rfs(*p) for p in of_levels]))
        assert found[f"i{name}"] == pytest.approx(mean(each))


def test_intervals_hold_the_value_and_draw_the_rows_of_one_image_together(answers):
    right, truth = answers
    for f in measures(right, truth, torch.arange(40)).values():
        assert f.low <= f.value <= f.high
    images = torch.arange(40) // 2
    found = measures(right, truth, images, seed=3)["accuracy"]
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(right["original"], 3, clusters=images))
    twice = measures(*({k: v.repeat(2) for k, v in part.items()} for part in answers), torch.arange(40).repeat(2))
    once = measures(right, truth, torch.arange(40))
    assert twice["bg_gap"].low == pytest.approx(once["bg_gap"].low)  # the same images twice tell no more


def subject(mask=True, side=40, key="a.png", seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side + 20, 3), dtype=torch.uint8, generator=generator)
    drawn = None
    if mask:
        y, x = torch.arange(side)[:, None], torch.arange(side + 20)[None]
        drawn = (y - 15) ** 2 + (x - 20) ** 2 < 80
    boxes = torch.tensor([[11.0, 6, 30, 25], [45, 20, 55, 30]])
    return Subject(key, pixels, boxes[:1] if mask else boxes, drawn, drawn)


@pytest.mark.parametrize("mask", [True, False])
def test_erased_images_are_the_views_that_the_branches_would_see(mask):
    """The audit erases before the cut, `make_views` while it cuts: both show the same, bit for bit."""
    one = subject(mask)
    boxes = one.boxes[:1]
    if not mask:
        one = Subject(one.key, one.pixels, boxes, None, None)
    changes = {
        "fg_only": ("fg", {"fg_mode": "masked"}),
        "bg_only_box": ("bg", {"bg": "box"}),
        "bg_only_mask": ("bg", {"bg": "shape"}),
    }
    for name, (branch, kind) in changes.items():
        spec = ViewSpec(size=32, **kind)
        changed = intervene(name, one, spec.fill, noise_pattern(one, 32, 0))
        if name == "bg_only_mask" and not mask:
            assert changed is None
            continue
        shown = make_views([changed], None, spec, branches=("full",)).full
        cut = getattr(make_views([one.pixels], boxes, spec, branches=(branch,), masks=[one.mask]), branch)
        assert torch.equal(shown, cut), name


def test_every_object_of_an_image_is_erased_and_filled_not_only_the_best():
    one = subject(mask=False)
    erased = intervene("bg_only_box", one, (1, 2, 3), noise_pattern(one, 32, 0))
    assert (erased[20:30, 45:55] == torch.tensor([1, 2, 3])).all() and (erased[6:25, 11:30] == torch.tensor([1, 2, 3])).all()
    flat = Subject("a", torch.where(one.inside[..., None], 255, 0).to(torch.uint8).expand(-1, -1, 3), one.boxes, None, None)
    assert (intervene("tiled", flat, (1, 2, 3), noise_pattern(flat, 32, 0)) == 0).all()


@pytest.mark.parametrize("where", ["fg", "bg"])
def test_noise_stays_where_it_belongs_and_has_the_strength_it_says(where):
    gray = Subject("a", torch.full((200, 300, 3), 128, dtype=torch.uint8), torch.tensor([[50.0, 40, 150, 120]]), None, None)
    noise = noise_pattern(gray, 300, seed=0)
    inside = gray.inside if where == "fg" else ~gray.inside
    changed = intervene(f"noise_{where}_30", gray, (0, 0, 0), noise)
    assert torch.equal(changed[~inside], gray.pixels[~inside])
    assert float(changed[inside].float().std()) == pytest.approx(30, rel=0.03)
    norm = (add_noise(gray.pixels, inside, noise, 10 / 255, l2=True).float() - 128).norm()
    assert float(norm) == pytest.approx(10 * (3 * 200 * 300) ** 0.5, rel=0.02)  # object or background: the same norm


def test_noise_weighs_the_same_on_a_large_file_as_on_a_small_one():
    """What the model sees of it: noise of single pixels would be averaged away by the resize, to 15 and to 5 of 60 levels."""
    spread = []
    for side in (64, 256, 768):
        gray = Subject("a", torch.full((side, side, 3), 128, dtype=torch.uint8), torch.tensor([[0.0, 0, 1, 1]]), None, None)
        changed = intervene("noise_bg_60", gray, (0, 0, 0), noise_pattern(gray, 64, seed=0))
        view = make_views([changed], None, ViewSpec(size=64, mean=(0, 0, 0), std=(1, 1, 1)), branches=("full",)).full
        spread.append(float(view.std()) * 255)
    assert spread[0] == pytest.approx(60, rel=0.1) and spread[2] == pytest.approx(spread[1], rel=0.05)
    assert spread[1] > 0.7 * spread[0]  # the resize itself smooths a little


def test_noise_hangs_on_seed_and_name_only():
    one, again, other = subject(), subject(seed=5), subject(key="b.png")
    assert torch.equal(noise_pattern(one, 32, 0), noise_pattern(again, 32, 0))
    assert not torch.equal(noise_pattern(one, 32, 0), noise_pattern(other, 32, 0))
    assert not torch.equal(noise_pattern(one, 32, 0), noise_pattern(one, 32, 1))


def test_a_swap_keeps_the_object_and_takes_nothing_of_the_other_one():
    one, other = subject(), subject(seed=1, key="b.png")
    other.pixels[6:25, 11:30] = torch.tensor([255, 0, 255], dtype=torch.uint8)
    changed = swap(one, other.background)
    assert torch.equal(changed[15, 20], one.pixels[15, 20])
    assert not ((changed == torch.tensor([255, 0, 255])).all(-1) & ~one.inside).any()
    assert torch.equal(changed[35:, 40:], other.pixels[35:, 40:])


def test_backgrounds_come_from_the_classes_they_should():
    labels = [*"aaaabbbbc"]
    keys = [f"{i}.png" for i in range(9)]
    donors = Donors(keys, labels, 4, seed=0)
    for i, label in enumerate(labels):
        of = donors.of(i)
        assert i not in of.values()
        assert ("mixed_same" in of) == (label != "c")  # the only image of its class has no other
        assert label == "c" or labels[of["mixed_same"]] == label
        assert labels[of["mixed_next"]] == {"a": "b", "b": "c", "c": "a"}[label]
        drawn = [of[f"mixed_rand_{k}"] for k in range(4)]
        assert len(set(drawn)) == 4
    assert donors.of(3) == Donors(keys, labels, 4, seed=0).of(3)
    assert any(donors.of(i) != Donors(keys, labels, 4, seed=1).of(i) for i in range(9))
    assert set(Donors(keys[:2], [*"ab"], 4, seed=0).of(0)) == {"mixed_next", "mixed_rand_0"}  # fewer images than backgrounds
    assert set(Donors(keys[:4], [*"aaaa"], 4, seed=0).of(0)) == {"mixed_same"}


def test_rows_of_one_image_lend_each_other_no_background():
    images = [0, 0, 1, 1, 2]
    donors = Donors([*"vwxyz"], [*"ababa"], 4, 0, images)
    for i in range(5):
        of = donors.of(i)
        assert images[i] not in {images[other] for other in of.values()}
        assert len({images[other] for name, other in of.items() if name.startswith("mixed_rand")}) == 2
    assert not Donors([*"vw"], [*"ab"], 4, 0, [0, 0]).of(0)


def figures(loss, accuracy=(0.9, 0.88, 0.92), gap=None):
    given = {"accuracy": Estimate(*accuracy), "swap_loss": Estimate(*loss)}
    return {**given, **({"bg_gap": Estimate(*gap)} if gap else {})}


@pytest.mark.parametrize(
    ("found", "images", "says"),
    [
        (figures((0.41, 0.36, 0.46), gap=(0.35, 0.3, 0.4)), 400, "41 points (36 to 46) of its 90 % accuracy, and 35 points"),
        (figures((0.41, 0.36, 0.46)), 400, "the background decides many of its predictions"),
        (figures((0.21, 0.19, 0.23)), 400, "it relies on the background"),
        (figures((0.21, 0.19, 0.23), gap=(0.01, -0.01, 0.03)), 400, "so any change has this effect, including the pasting"),
        (figures((0.02, 0.00, 0.04)), 400, "the object decides"),
        (figures((-0.02, -0.03, 0.0)), 400, "loses nothing: the object decides"),
        (figures((0.06, 0.01, 0.11)), 40, "40 images are too few to tell whether that is more than 5 points"),
        (figures((-0.01, -0.09, 0.06)), 40, "loses nothing of its 90 % accuracy (-9 to 6 points): 40 images are too few"),
        (figures((0.06, 0.01, 0.11)), 19, "Only 19 images"),
        (figures((0.0, 0.0, 0.0), accuracy=(0.12, 0.09, 0.15)), 400, "no better than guessing among 10 classes"),
        ({"accuracy": Estimate(0.9, 0.8, 1.0)}, 400, "No background of another class"),
    ],
)
def test_the_verdict_respects_the_whole_interval(found, images, says):
    assert says in verdict_of("this model", found, images, 10)


def test_a_wide_interval_of_the_gap_names_no_cause():
    said = verdict_of("this model", figures((0.3, 0.1, 0.5), gap=(0.1, -0.01, 0.21)), 40, 10)
    assert said.endswith("(10 to 50) of its 90 % accuracy: it relies on the background.")


def test_nothing_of_an_object_is_left_where_its_mask_sticks_out_of_its_box():
    """An ellipse whose detector's box is too small: 266 of its pixels used to stay visible."""
    y, x = torch.arange(64)[:, None], torch.arange(80)[None]
    mask = ((y - 32) / 20) ** 2 + ((x - 40) / 30) ** 2 < 1
    box = torch.tensor([[16.0, 16, 62, 46]])
    one = Subject("a", torch.full((64, 80, 3), 255, dtype=torch.uint8), box, mask, mask)
    erased = intervene("bg_only_box", one, (0, 0, 0), noise_pattern(one, 32, 0))
    assert not erased[mask].any() and not erased[13:52, 11:70].any() and erased[:12].all() and erased[:, 71:].all()
    spec = ViewSpec(size=80, bg="box", fill=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1), square=False)
    view = make_views([one.pixels], box, spec, branches=("bg",), masks=[mask]).bg
    assert torch.equal(make_views([erased], None, spec, branches=("full",)).full, view)


def test_the_accuracies_of_rfs_are_averaged_over_classes(answers):
    """RIVAL10: rare classes count as much as frequent ones; written out in numpy."""
    right, truth = answers
    labels = np.array(["common"] * 30 + ["rare"] * 10)
    found = measures(right, truth, torch.arange(40), labels=labels.tolist(), draws=50)
    for level in STD_LEVELS:
        noise = [right[f"noise_{w}_{level}"].numpy() for w in ("fg", "bg")]
        fg, bg = (np.mean([values[labels == name].mean() for name in ("common", "rare")]) for values in noise)
        assert found[f"rfs_{level}"].value == pytest.approx(naive_rfs(fg, bg))
    assert max(L2_LEVELS) == 131 and found["rfs_l2"].low <= found["rfs_l2"].value <= found["rfs_l2"].high
    assert found["accuracy"].value == pytest.approx(right["original"].mean().item())  # everything else counts rows


def test_the_backgrounds_of_a_challenge_are_those_of_every_other_image():
    donors = Donors([f"{i}" for i in range(7)], ["a", "b"] * 3 + ["a"], 2, 0, [0, 0, 1, 2, 3, 4, 5])
    assert sorted(donors.others(0)) == [2, 3, 4, 5, 6] and sorted(donors.others(4)) == [0, 2, 3, 5, 6]
    assert donors.others(0) == donors.others(0)


@pytest.mark.parametrize(
    ("loss", "fg_mode", "masks", "advised"),
    [
        ((0.2, 0.1, 0.3), "crop", True, True),
        ((0.2, 0.1, 0.3), "crop", False, False),
        ((0.2, 0.1, 0.3), "masked_crop", True, False),
        ((0.1, 0.04, 0.2), "crop", True, False),
    ],
)
def test_masks_are_advised_where_they_exist_and_the_crop_certainly_leans_on_its_background(loss, fg_mode, masks, advised):
    advice = advice_of(figures(loss), fg_mode, masks)
    assert (advice is not None) == advised
