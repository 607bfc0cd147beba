"""Detections, and the mapping from a view back to its image."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from l2r2_models.boxes.detections import Detections, ViewMap
from l2r2_models.errors import L2R2Error
from l2r2_models.views import ViewSpec, make_views

NAN, INF = float("nan"), float("inf")
SIZE = (30, 40)  # height, width


def found(boxes, scores=None, labels=None, masks=None, size=SIZE):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores)
    return Detections(boxes, scores, size, labels or ("",) * len(boxes), masks)


# ---- making them ----


def test_from_lists_sorts_best_first():
    d = Detections.from_lists([[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]], SIZE, [0.2, 0.9, 0.5], ["a", "b", "c"])
    assert d.scores.tolist() == pytest.approx([0.9, 0.5, 0.2]) and d.labels == ("b", "c", "a")
    assert d.boxes[:, 2].tolist() == [2, 3, 1] and d.boxes.dtype == torch.float32


def test_from_lists_of_nothing():
    for empty in ([], (), torch.zeros(0, 4)):
        d = Detections.from_lists(empty, SIZE)
        assert len(d) == 0 and d.boxes.shape == (0, 4) and d.labels == ()
        assert len(d.usable().above(0.5).clipped().sorted()) == 0


def test_a_box_without_score_is_certain():
    assert Detections.from_lists([[0, 0, 1, 1]], SIZE).scores.tolist() == [1.0]


@pytest.mark.parametrize(
    "boxes",
    [
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, 6, 7, 8]],
        [[1, 2], [3, 4]],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5, 6, 7, 8],
        [[1, 2, 3, 4], [5]],
        [["a", "b", "c", "d"]],
        [[None] * 4],
        "box",
        None,
        7,
        [[[1, 2, 3, 4]]],
    ],
)
def test_what_is_not_a_list_of_boxes_is_refused(boxes):
    with pytest.raises(L2R2Error):
        Detections.from_lists(boxes, SIZE)


@pytest.mark.parametrize("scores", [[0.5, 0.5], [], ["high"], [[0.5]], [None]])
def test_scores_must_be_one_a_box(scores):
    with pytest.raises(L2R2Error):
        Detections.from_lists([[0, 0, 1, 1]], SIZE, scores)


def test_labels_must_be_one_a_box():
    with pytest.raises(L2R2Error):
        Detections.from_lists([[0, 0, 1, 1]], SIZE, labels=["a", "b"])


def test_numbers_beyond_float32_are_boxes_that_are_not_usable():
    d = Detections.from_lists([[0, 0, 1e300, 1e300], [0, 0, 5, 5]], SIZE)
    assert len(d) == 2 and d.usable().boxes.tolist() == [[0, 0, 5, 5]]


def test_masks_must_have_the_images_size():
    with pytest.raises(L2R2Error, match="masks"):
        found([[0, 0, 1, 1]], masks=torch.ones(1, 40, 30, dtype=torch.bool))


# ---- choosing ----


def test_clipped():
    d = found([[-5, -5, 50, 35], [3, 4, 5, 6], [100, 100, 120, 120]]).clipped()
    assert d.boxes.tolist() == [[0, 0, 40, 30], [3, 4, 5, 6], [40, 30, 40, 30]]


@pytest.mark.parametrize(
    "box",
    [
        [NAN] * 4,
        [NAN, 0, 5, 5],
        [0, 0, INF, 5],
        [0, -INF, 5, 5],
        [10, 10, 5, 15],
        [10, 10, 15, 5],
        [5, 5, 5, 9],
        [5, 5, 9, 5],
        [-9, 0, 0, 5],
        [-9, 0, -1, 5],
        [40, 0, 45, 5],
        [0, 30, 5, 35],
        [0, 31, 5, 35],
        [20, 20, 10, 10],
    ],
)
def test_unusable_boxes_go(box):
    d = found([box, [1, 1, 9, 9]], [0.9, 0.4]).usable()
    assert d.boxes.tolist() == [[1, 1, 9, 9]] and d.scores.tolist() == pytest.approx([0.4])


@pytest.mark.parametrize(
    "box", [[0, 0, 40, 30], [-9, -9, 0.1, 0.1], [39.5, 29.5, 99, 99], [3.2, 3.2, 3.4, 3.4], [-1e9, -1e9, 1e9, 1e9]]
)
def test_boxes_that_touch_a_pixel_stay_as_they_are(box):
    d = found([box]).usable()
    assert d.boxes.tolist() == torch.tensor([box]).tolist()


def test_above_keeps_equal_scores_and_drops_nan():
    d = found([[0, 0, i, i] for i in range(1, 5)], [0.5, 0.49, NAN, 0.9]).above(0.5)
    assert d.boxes[:, 2].tolist() == [1, 4]
    assert len(found([[0, 0, 1, 1]], [NAN]).above(0.0)) == 0


def test_sorted_keeps_the_order_of_equal_scores():
    d = found([[0, 0, i, i] for i in range(1, 41)], [0.5, 0.9] * 20).sorted()
    assert d.boxes[:, 2].tolist() == [*range(2, 41, 2), *range(1, 41, 2)]


def test_a_score_of_nan_is_never_the_best():
    assert found([[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]], [NAN, 0.1, 0.9]).sorted().boxes[:, 2].tolist() == [3, 2, 1]


def test_select_carries_masks_and_labels():
    masks = torch.zeros(3, *SIZE, dtype=torch.bool)
    masks[1, 4, 5] = True
    d = found([[0, 0, i, i] for i in (1, 2, 3)], [0.1, 0.2, 0.3], ("a", "b", "c"), masks)
    by_flag = d.select(torch.tensor([False, True, True]))
    assert by_flag.labels == ("b", "c") and by_flag.masks[0, 4, 5] and by_flag.masks.shape == (2, *SIZE)
    by_place = d.select(torch.tensor([2, 1, 1]))
    assert by_place.labels == ("c", "b", "b") and by_place.masks.sum((1, 2)).tolist() == [0, 1, 1]
    none = d.select(torch.zeros(3, dtype=torch.bool))
    assert len(none) == 0 and none.masks.shape == (0, *SIZE) and none.labels == ()


def test_methods_leave_their_object_alone():
    d = found([[-5, 0, 5, 5], [NAN] * 4], [0.1, 0.9])
    before = d.boxes.clone(), d.scores.clone()
    d.clipped(), d.usable(), d.sorted(), d.above(0.5), d.windows(1.0)
    assert torch.equal(d.boxes.nan_to_num(-1), before[0].nan_to_num(-1)) and torch.equal(d.scores, before[1])


def test_windows_grow_and_are_rounded_outwards():
    windows, valid = found([[10.2, 10.8, 14.2, 12.8], [38, 0, 40, 1], [NAN] * 4]).windows(margin=0.5)
    assert windows[:2].tolist() == [[8, 9, 17, 14], [37, 0, 40, 2]] and valid.tolist() == [True, True, False]


# ---- back to the image ----

windows = st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h), st.integers(0, 500), st.integers(0, 500), st.integers(1, 400), st.integers(1, 400)
)


def into_view(x, y, window, size, square):
    """Where a point of the image lies in the view: cut, pad to a centered square, resize."""
    x0, y0, x1, y1 = window
    width, height = x1 - x0, y1 - y0
    pad_x = max(0, height - width) // 2 if square else 0
    pad_y = max(0, width - height) // 2 if square else 0
    wide, high = (max(width, height),) * 2 if square else (width, height)
    return (x - x0 + pad_x) / wide * size[1], (y - y0 + pad_y) / high * size[0]


@settings(max_examples=200, deadline=None)
@given(
    window=windows,
    size=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    square=st.booleans(),
    points=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
)
def test_boxes_come_back_to_where_they_were(window, size, square, points):
    x0, y0, x1, y1 = window
    box = [x0 + points[0] * (x1 - x0), y0 + points[1] * (y1 - y0), x0 + points[2] * (x1 - x0), y0 + points[3] * (y1 - y0)]
    seen = [*into_view(box[0], box[1], window, size, square), *into_view(box[2], box[3], window, size, square)]
    back = ViewMap(window, size, square).boxes_to_image(torch.tensor(seen, dtype=torch.float64))
    assert back.tolist() == pytest.approx(box, abs=1e-6)


def test_boxes_of_any_shape_and_type_come_back():
    view = ViewMap((10, 20, 30, 60), (100, 100))  # 20x40, so the canvas is [0, 20, 40, 60]
    assert view.canvas == (0, 20, 40, 60)
    boxes = torch.tensor([25.0, 0, 75, 100]).expand(2, 3, 4)
    assert view.boxes_to_image(boxes).tolist() == [[[10, 20, 30, 60]] * 3] * 2
    assert view.boxes_to_image(boxes.half()).dtype == torch.float16
    assert view.boxes_to_image(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize(
    "window", [(0, 0, 40, 30), (0, 0, 7, 30), (33, 3, 40, 30), (5, 20, 40, 30), (12, 5, 33, 26), (39, 29, 40, 30)]
)
def test_a_map_returns_to_its_window(window, square):
    x0, y0, x1, y1 = window
    out = ViewMap(window, (28, 28), square).map_to_image(torch.ones(14, 14), SIZE)
    assert out.shape == SIZE and torch.allclose(out[y0:y1, x0:x1], torch.ones(()))
    assert out.sum() == pytest.approx((x1 - x0) * (y1 - y0))


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("window", [(0, 0, 40, 30), (0, 0, 9, 30), (31, 3, 40, 30), (5, 20, 40, 30), (12, 5, 33, 26)])
@pytest.mark.parametrize("at", [(0.0, 0.0), (0.99, 0.99), (0.5, 0.3)])
def test_a_peak_returns_to_its_pixel(window, square, at):
    x0, y0, x1, y1 = window
    pixel = x0 + int(at[0] * (x1 - x0)), y0 + int(at[1] * (y1 - y0))
    size = (160, 160)
    vx, vy = into_view(pixel[0] + 0.5, pixel[1] + 0.5, window, size, square)
    saliency = torch.zeros(size)
    saliency[max(0, int(vy) - 1) : int(vy) + 2, max(0, int(vx) - 1) : int(vx) + 2] = 1
    out = ViewMap(window, size, square).map_to_image(saliency, SIZE)
    row, column = divmod(int(out.argmax()), SIZE[1])
    assert (column, row) == pixel


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("box", [(3.3, 2.7, 60.2, 31.9), (50, -9, 90, 40), (20, 5, 31, 58), (-20, 30, 14.5, 80)])
def test_agrees_with_what_make_views_cuts(box, square, margin):
    """A bright patch is found in the view and mapped back to where it was painted."""
    height, width = 60, 80
    d = found([box], size=(height, width))
    window = tuple(d.windows(margin)[0][0].tolist())
    x0, y0, x1, y1 = window
    left, top = (x0 + x1) // 2 - 2, (y0 + y1) // 2 - 3
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[top : top + 5, left : left + 4] = 255
    spec = ViewSpec(
        size=256, margin=margin, square=square, fill=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"
    )
    view = make_views([image], d.boxes, spec, branches=("fg",)).fg[0, 0]
    rows, columns = (view > 0.5).nonzero().unbind(1)
    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    back = ViewMap(window, (256, 256), square).boxes_to_image(seen)
    assert back.tolist() == pytest.approx([left, top, left + 4, top + 5], abs=0.51)
    saliency = ViewMap(window, (256, 256), square).map_to_image(view, (height, width))
    assert torch.equal(saliency > 0.5, image[..., 0] > 0)


DEGENERATE = {
    "a point between pixels": [5.2, 5.2, 5.2, 5.2],
    "a point on a corner": [5, 5, 5, 5],
    "inverted inside one pixel": [10.6, 10.2, 10.4, 10.9],
    "inverted": [20, 5, 10, 9],
    "no width": [5.2, 3, 5.2, 9],
    "no height": [3, 5.2, 9, 5.2],
    "left of the image": [-9, 3, -0.5, 9],
    "not a number": [NAN, 3, 9, 9],
}


@pytest.mark.parametrize("box", DEGENERATE.values(), ids=DEGENERATE)
def test_a_box_without_area_is_no_object_anywhere(box):
    """In detections, views, batches and graphs, whatever rounding would make of it."""
    from l2r2_models.views import cut_batch
    from l2r2_models.views.traceable import cut_in_graph

    boxes, spec = torch.tensor([box, [4.0, 4, 12, 12]]), ViewSpec(size=8, margin=0.3)
    image = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8)
    assert len(Detections.from_lists([box], (24, 32)).usable()) == 0
    assert make_views([image], boxes, spec, image_index=torch.tensor([0, 0])).has_fg.tolist() == [False, True]
    assert cut_batch(torch.randn(2, 3, 24, 32), boxes, spec, "fg")[1].tolist() == [False, True]
    assert cut_in_graph(image, boxes, spec, ("fg",))[1].tolist() == [False, True]
