"""Images in folders, mask files, and pixels as tensors."""

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from l2r2_models.images import ImageError, image_tensor, is_image_path, list_images, load_image, load_mask

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
    with pytest.raises(ImageError, match=r"m\.png: the mask is 4x3, but its image is 3x4"):
        load_mask(tmp_path / "m.png", (4, 3))


def test_image_tensor_is_a_copy_of_the_pixels():
    image = Image.fromarray(PIXELS)
    tensor = image_tensor(image)
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), PIXELS)
    tensor.zero_()
    assert np.array_equal(np.asarray(image), PIXELS)


def deep_tiff(levels, bits, photometric=1):
    """A little-endian grayscale TIFF of 16 bits a sample, or of 12, packed most significant bit first (TIFF 6.0)."""
    height, width = levels.shape
    if bits == 12:
        data = b"".join(int("".join(f"{v:012b}" for v in row), 2).to_bytes(width * 12 // 8, "big") for row in levels.tolist())
    else:
        data = levels.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_deep_tiffs_are_scaled_by_their_own_range(bits, photometric):
    white = 2**bits - 1
    levels = np.linspace(0, white, 12 * 8).round().astype(np.int64).reshape(8, 12)
    loaded = np.asarray(load_image(deep_tiff(levels, bits, photometric)))
    expected = np.rint(255 * (levels if photometric else white - levels) / white)
    assert np.abs(loaded[..., 0] - expected).max() <= 1


# ---- what is opened ----


def photo_file(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    path = photo_file(tmp_path)
    data = path.read_bytes()
    with open(path, "rb") as file:
        of_file = [str(path), path, data, bytearray(data), memoryview(data), file]
        for source in [*of_file, Image.open(path), PIXELS, torch.from_numpy(PIXELS)]:
            assert np.array_equal(np.asarray(load_image(source)), PIXELS), type(source)
    assert np.array_equal(np.asarray(load_image(PIXELS[..., 0]))[..., 2], PIXELS[..., 0])


@pytest.mark.parametrize(
    "source",
    [None, 5, ["a.jpg"], {"path": "a.jpg"}, PIXELS.astype(np.float32), PIXELS.transpose(2, 0, 1), torch.zeros(3, 8, 8), object()],
    ids=lambda source: type(source).__name__,
)
def test_what_is_no_image_is_a_type_error_and_no_damaged_file(source):
    with pytest.raises(TypeError, match=r"must be (a path, bytes|uint8 \[H, W, 3\])"):
        load_image(source)


def test_a_pipe_a_device_and_a_huge_file_are_refused_at_once(tmp_path):
    """Where they were opened, the pipe would wait forever and the device never end."""
    pipe, huge = tmp_path / "pipe.jpg", tmp_path / "huge.jpg"
    os.mkfifo(pipe)
    with open(huge, "wb") as file:
        file.truncate(3 << 30)  # sparse
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    for path, why in ((pipe, "is not a regular file"), (tmp_path / "link.jpg", "is not a regular file"), (huge, "3,072 MB")):
        with pytest.raises(ImageError, match=why) as caught:
            load_image(path)
        assert str(caught.value).startswith(str(path))
