"""Pixels of JPEG files, which torchvision may decode, are those that Pillow decodes."""

import pytest
import torch
import torchvision
from PIL import Image
from test_images import encode, exif_of, pixels

from l2r2_models.images import ImageError, LazyImage, image_tensor

CASES = {
    "full color": ("RGB", {"quality": 90, "subsampling": 0}),
    "less color": ("RGB", {"quality": 40, "subsampling": 2}),
    "progressive": ("RGB", {"progressive": True}),
    "gray": ("L", {}),
    "CMYK": ("CMYK", {}),
    "turned": ("RGB", {"exif": exif_of(6)}),
    "upright": ("RGB", {"exif": exif_of(1)}),
    "mirrored": ("RGB", {"exif": exif_of(2)}),
}


@pytest.fixture
def by_torchvision(monkeypatch):
    """The files that torchvision decodes."""
    decoded, original = [], torchvision.io.decode_jpeg
    monkeypatch.setattr("torchvision.io.decode_jpeg", lambda data, mode: decoded.append(data) or original(data, mode))
    return decoded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1, 2])
def test_pixels_of_a_file_are_those_of_the_loaded_image(case, scale, by_torchvision):
    mode, options = CASES[case]
    smooth = Image.fromarray(pixels(5, 7)).resize((61, 43), Image.Resampling.BICUBIC).convert(mode)
    data = encode(smooth, "JPEG", **options)
    expected = image_tensor(LazyImage(data).load(scale))
    found = LazyImage(data).pixels(scale)
    assert found.shape == expected.shape and found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1  # of two builds of libjpeg; 0 where they are the same
    assert len(by_torchvision) == (scale == 1 and case in ("full color", "less color", "progressive", "upright"))


def test_a_truncated_jpeg_fails_in_the_same_sentence():
    data = encode(Image.fromarray(pixels(60, 80)), "JPEG")[:-200]
    sentences = []
    for decode in (LazyImage.load, LazyImage.pixels):
        with pytest.raises(ImageError) as found:
            decode(LazyImage(data, name="a.jpg"))
        sentences.append(str(found.value))
    assert sentences[0] == sentences[1] and sentences[0].startswith("a.jpg: ")


def test_pillow_decodes_where_torchvision_cannot(monkeypatch):
    data = encode(Image.fromarray(pixels()), "JPEG")

    asked = []

    def missing(*_):
        asked.append(1)
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr("torchvision.io.decode_jpeg", missing)
    assert torch.equal(LazyImage(data).pixels(), image_tensor(LazyImage(data).load())) and asked
