"""Images in folders, masks beside them, and pixels as tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from l2r2_models.images import ImageError, image_tensor, is_image_path, list_images, load_mask

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.JPG", "b/10.png", "a.jpeg", ".hidden.jpg", ".cache/x.jpg", "notes.txt", "b/._2.JPG"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def names(paths, root):
    return [p.relative_to(root).as_posix() for p in paths]


def test_folders_are_searched_sorted_without_hidden_files(folder):
    assert names(list_images([folder]), folder) == ["a.jpeg", "b/10.png", "b/2.JPG"]
    assert list_images([str(folder)]) == list_images([folder])


def test_named_files_are_kept_whatever_they_are(folder):
    given = [folder / "notes.txt", folder / ".hidden.jpg"]
    assert list_images(given) == given


def test_a_hidden_folder_that_is_named_is_searched(folder):
    assert names(list_images([folder / ".cache"]), folder) == [".cache/x.jpg"]


def test_order_of_the_sources_stays_and_nothing_comes_twice(folder):
    assert names(list_images([folder / "b", folder / "b" / "2.JPG", folder]), folder) == ["b/10.png", "b/2.JPG", "a.jpeg"]


def test_empty_folder_and_missing_source(tmp_path):
    with pytest.raises(ImageError, match="no image in this folder"):
        list_images([tmp_path])
    with pytest.raises(ImageError, match="no such file or folder"):
        list_images([tmp_path / "none"])


def test_paths_through_the_parent_folder_are_not_hidden(tmp_path):
    assert is_image_path(tmp_path.relative_to(tmp_path) / ".." / "a.jpg")
    assert not is_image_path(tmp_path.relative_to(tmp_path) / ".." / ".cache" / "a.jpg")


# ---- masks and tensors ----


def test_mask_is_true_where_bright(tmp_path):
    levels = np.array([[0, 127, 128, 255]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "m.png")
    mask = load_mask(tmp_path / "m.png", (1, 4))
    assert mask.dtype == torch.bool and mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "I;16"])
def test_masks_of_every_mode(tmp_path, mode):
    levels = np.array([[0, 255]], np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    image.save(tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png", (1, 2)).tolist() == [[False, True]]


def test_a_black_mask_is_empty(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "m.png")
    assert not load_mask(tmp_path / "m.png", (3, 4)).any()


def test_a_mask_of_zeros_and_ones_is_refused_instead_of_read_as_empty(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=r"m\.png: .*brightest level is 1"):
        load_mask(tmp_path / "m.png", (4, 4))


def test_a_mask_of_another_size_is_refused(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=r"m\.png: the mask is 4x3, its image 3x4"):
        load_mask(tmp_path / "m.png", (4, 3))


def test_image_tensor_is_a_copy_of_the_pixels():
    image = Image.fromarray(PIXELS)
    tensor = image_tensor(image)
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), PIXELS)
    tensor.zero_()
    assert np.array_equal(np.asarray(image), PIXELS)
