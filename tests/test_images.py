"""Image loading: every mode and orientation, and one sentence that names the file for every damaged one."""

import io
import struct
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from l2r2_models import images
from l2r2_models.errors import L2R2Error, printable
from l2r2_models.images import FILL, ImageError, load_image

ORIENTATION = 0x0112
# How upright pixels are stored under each EXIF orientation (TIFF 6.0, "Orientation"), in numpy's words.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, -1),
}


def pixels(height=9, width=14, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_header(width, height):
    """A PNG that promises width x height and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def refused(source, name=None):
    """The message with which a source is refused: one sentence, naming the file."""
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert message.startswith(printable(str(name or source))) and "\n" not in message and message.endswith(".")
    assert len(message) < 500
    return message


# ---- orientation ----


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_upright_pixels(orientation, format):
    upright = pixels()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"lossless": True} if format == "WEBP" else {}
    loaded = load_image(encode(stored, format, exif=exif_of(orientation), **options))
    assert np.array_equal(np.asarray(loaded), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_orientation(orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255  # only the upper left block is bright
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    loaded = np.asarray(load_image(encode(stored, "JPEG", quality=95, exif=exif_of(orientation))))
    assert loaded.shape == upright.shape and np.abs(loaded.astype(int) - upright).max() < 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_loading_twice_turns_only_once(orientation):
    image = Image.open(io.BytesIO(encode(Image.fromarray(pixels()), "PNG", exif=exif_of(orientation))))
    once = load_image(image)
    assert np.array_equal(np.asarray(load_image(once)), np.asarray(once))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(orientation):
    assert load_image(encode(Image.fromarray(pixels()), "PNG", exif=exif_of(orientation))).size == (14, 9)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_a_damaged_exif_block_does_not_cost_the_image(format, exif):
    assert load_image(encode(Image.fromarray(pixels()), format, exif=exif)).size == (14, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_images_are_turned_too(format, orientation):
    upright = pixels()[..., 0]
    deep = np.ascontiguousarray(STORED[orientation](upright)).astype(np.uint16) * 257
    loaded = np.asarray(load_image(encode(Image.fromarray(deep), format, exif=exif_of(orientation))))
    assert np.array_equal(loaded[..., 0], upright)


# ---- modes ----


def assert_grey(loaded, expected):
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.repeat(np.asarray(expected, np.uint8)[..., None], 3, 2))


def test_grey_and_bilevel():
    gray = pixels()[..., 0]
    assert_grey(load_image(encode(Image.fromarray(gray), "PNG")), gray)
    assert_grey(load_image(encode(Image.fromarray(gray > 127), "PNG")), (gray > 127) * 255)


@pytest.mark.parametrize("fill", [(0, 0, 0), (255, 255, 255), FILL])
def test_transparent_pixels_show_the_fill(fill):
    rgba = np.dstack([pixels(), np.full((9, 14), 255, np.uint8)])
    rgba[:, :7, 3] = 0
    loaded = np.asarray(load_image(encode(Image.fromarray(rgba, "RGBA"), "PNG"), fill=fill))
    assert (loaded[:, :7] == fill).all() and np.array_equal(loaded[:, 7:], rgba[:, 7:, :3])


@pytest.mark.parametrize("alpha", [1, 77, 128, 254])
def test_half_transparent_pixels_are_mixed(alpha):
    loaded = load_image(Image.new("RGBA", (2, 2), (200, 10, 90, alpha)), fill=(20, 220, 100))
    expected = [(c * alpha + f * (255 - alpha)) / 255 for c, f in zip((200, 10, 90), (20, 220, 100))]
    assert np.abs(np.array(loaded.getpixel((0, 0))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_every_mode_with_alpha_is_composited(mode):
    clear = load_image(Image.new(mode, (3, 2)), fill=(1, 2, 3))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (1, 2, 3)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert list(np.asarray(load_image(encode(image, "PNG")))[0].tolist()) == [[10, 20, 30], [200, 100, 50]]
    for transparency in (0, bytes([0, 255])):  # one index, or an alpha for each
        loaded = load_image(encode(image, "PNG", transparency=transparency), fill=(7, 8, 9))
        assert np.asarray(loaded)[0].tolist() == [[7, 8, 9], [200, 100, 50]]


@pytest.mark.parametrize("mode, color", [("RGB", (9, 8, 7)), ("L", 9)])
def test_a_transparent_color_is_composited(mode, color):
    image = Image.new(mode, (3, 2), color)
    assert load_image(encode(image, "PNG", transparency=color), fill=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_cmyk_is_not_inverted():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    for source in (cmyk, encode(cmyk, "JPEG", quality=95), encode(cmyk, "TIFF")):
        red, green, blue = load_image(source).getpixel((8, 8))
        assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("mode", ["LAB", "HSV", "YCbCr", "RGBX"])
def test_other_color_spaces_keep_what_they_show(mode):
    """LAB has a band called A, which is no alpha."""
    if mode == "LAB":
        bright, dark = Image.new("LAB", (2, 2), (255, 128, 128)), Image.new("LAB", (2, 2), (0, 128, 128))
        assert min(load_image(bright, fill=(99, 0, 0)).getpixel((0, 0))) > 220
        assert max(load_image(dark, fill=(99, 0, 0)).getpixel((0, 0))) < 40
    else:
        color = Image.new("RGB", (2, 2), (200, 60, 60))
        assert np.abs(np.asarray(load_image(color.convert(mode))).astype(int) - (200, 60, 60)).max() < 4


@pytest.mark.parametrize("format, dtype", [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bit_is_rescaled_not_clipped(format, dtype):
    levels = np.array([[0, 255, 257, 32768, 40000, 65535]], np.uint16)
    image = Image.fromarray(levels.astype(dtype))
    assert_grey(load_image(encode(image, format)), np.rint(levels / 257))
    assert_grey(load_image(image), np.rint(levels / 257))


def test_sixteen_bit_of_two_images_stays_comparable():
    """The format's range decides, not the content: the same gray is the same in a dark and in a bright picture."""
    dark = load_image(Image.fromarray(np.full((2, 2), 3000, np.uint16)))
    bright = load_image(Image.fromarray(np.array([[3000, 65535]], np.uint16)))
    assert dark.getpixel((0, 0)) == bright.getpixel((0, 0)) == (12, 12, 12)


def test_twelve_bit_pgm_uses_its_own_maximum():
    data = b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes()
    assert_grey(load_image(data), [[0, 128, 255]])


def test_integer_and_float_images():
    assert_grey(load_image(Image.fromarray(np.array([[0, 65535, 25700]], np.int32))), [[0, 255, 100]])
    assert_grey(load_image(Image.fromarray(np.array([[0.0, 1.0, 0.4]], np.float32))), [[0, 255, 102]])


@pytest.mark.parametrize("value", [-1.0, 1.5, 255.0, np.nan, np.inf])
def test_float_images_of_unknown_range_are_refused(value):
    image = Image.fromarray(np.array([[0.5, value]], np.float32))
    assert "[0, 1]" in refused(image, "image")


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integer_images_of_unknown_range_are_refused(value):
    refused(Image.fromarray(np.array([[5, value]], np.int32)), "image")


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert load_image(data).getpixel((4, 4)) == (255, 0, 0), format


# ---- the caller's image ----


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1", "CMYK", "RGBA", "I;16", "I", "F"])
def test_a_callers_image_is_not_modified(mode):
    image = Image.fromarray(pixels()[..., 0]).convert("L")
    image = Image.fromarray(np.asarray(image).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    image = image.point(lambda v: v / 255) if mode == "F" else image
    image.getexif()[ORIENTATION] = 6
    before, info, size = image.tobytes(), dict(image.info), image.size
    loaded = load_image(image)
    loaded.paste((1, 2, 3), (0, 0, *loaded.size))
    assert (image.tobytes(), dict(image.info), image.size, image.mode) == (before, info, size, mode)
    assert image.getexif()[ORIENTATION] == 6 and loaded.size == (9, 14)


def test_paths_bytes_and_pil_agree(tmp_path):
    image = Image.fromarray(pixels())
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), Image.open(tmp_path / "a.png"), image):
        assert np.array_equal(np.asarray(load_image(source)), pixels())


def test_content_decides_not_the_suffix(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.jpg")), pixels())


# ---- too large ----


@pytest.mark.parametrize("size", [(20_000, 10_000), (12_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_001, 10_000)])
def test_forged_sizes_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "pixels" in message and "100,000,000" in message and peak < 5_000_000


def test_the_limit_is_inclusive():
    image = Image.new("RGB", (10, 10))
    assert load_image(image, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10x10 = 100 pixels"):
        load_image(image, max_pixels=99)


def test_a_limit_beyond_pillows_own_names_the_limit_that_holds():
    with pytest.raises(ImageError, match="178,956,970"):
        load_image(png_header(20_000, 10_000), max_pixels=400_000_000)


# ---- damaged, and not images ----


def test_empty_file(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "empty" in refused(path)
    assert "empty" in refused(b"", "image")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_truncated_files(tmp_path, format, part):
    data = encode(Image.fromarray(pixels(64, 80)), format)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: max(1, int(len(data) * part))])
    refused(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
def test_random_damage_is_an_image_or_an_image_error(format):
    data = encode(Image.fromarray(pixels(24, 20)), format)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            assert load_image(bytes(damaged)).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)


def test_a_zip_archive_renamed(tmp_path):
    path = tmp_path / "photos.jpg"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    assert "ZIP" in refused(path)


def test_text_renamed(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not an image\nat all")
    assert "not an image" in refused(path)


def test_postscript_is_never_run(tmp_path):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    assert "not an image" in refused(path)


def test_folder_and_missing_file(tmp_path):
    assert "folder" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "none.jpg")
    assert "no such file" in refused(str(tmp_path / "none.jpg"))


def test_names_that_no_file_can_have(tmp_path):
    refused(tmp_path / ("x" * 300 + ".jpg"))
    refused(tmp_path / "a.jpg" / "b.jpg")
    refused("a\0b.jpg")


def test_something_else_than_an_image():
    closed = Image.open(io.BytesIO(encode(Image.new("RGB", (4, 4)), "PNG")))
    closed.close()
    refused(closed, "image")


def test_the_given_name_is_used():
    with pytest.raises(ImageError, match=r"^upload 7: "):
        load_image(b"text", name="upload 7")


def test_image_errors_are_the_librarys_errors():
    assert issubclass(ImageError, L2R2Error)


def test_threads_leave_the_warnings_of_the_process_alone(monkeypatch):
    """The first thread to begin is the first to end, while the second still loads."""
    began, ended = threading.Event(), threading.Event()
    to_rgb = images._to_rgb

    def slow(image, fill, name, *scale):
        began.set() if name == "second" else began.wait(10)
        if name == "second":
            ended.wait(10)
        return to_rgb(image, fill, name, *scale)

    monkeypatch.setattr(images, "_to_rgb", slow)
    before = list(warnings.filters)
    data = encode(Image.fromarray(pixels()), "PNG")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load_image, data, name="first")
        second = pool.submit(load_image, data, name="second")
        first.result(20)
        ended.set()
        second.result(20)
    assert list(warnings.filters) == before


def test_warnings_are_back_after_an_error():
    before = list(warnings.filters)
    refused(b"text", "image")
    assert list(warnings.filters) == before
