"""Files that are no good images, in forty ways."""

import os
import zipfile

import numpy as np
from PIL import Image
from test_images import encode, pixels, png_header

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM")


def write_bad_images(folder):
    """Write the files into a folder and return their paths, sorted."""
    folder.mkdir(parents=True)
    image = Image.fromarray(pixels(64, 80))
    for format in FORMATS:
        data = encode(image, format)
        for part in (0.02, 0.3, 0.9):
            (folder / f"{format}_{part}.jpg").write_bytes(data[: max(1, int(len(data) * part))])
    for i, size in enumerate([(20_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 7)]):
        (folder / f"size_{i}.png").write_bytes(png_header(*size))
    texts = {"empty": b"", "text": b"not an image\nat all", "zeros": bytes(500), "html": b"<html>404</html>", "json": b"{}"}
    texts |= {"half": b"\xff\xd8\xff", "gif": b"GIF89a", "riff": b"RIFF....WEBP", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n"}
    texts |= {"noise": np.random.default_rng(0).bytes(3000)}
    for name, data in texts.items():
        (folder / f"{name}.jpg").write_bytes(data)
    with zipfile.ZipFile(folder / "archive.jpg", "w") as archive:
        archive.writestr("a.txt", "text")
    for i, value in enumerate((-1.0, 2.0, np.nan)):
        Image.fromarray(np.array([[0.5, value]], np.float32)).save(folder / f"float_{i}.tif")
    (folder / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    with open(folder / "huge.jpg", "wb") as file:
        file.truncate(3 << 30)  # sparse
    return sorted(folder.iterdir())
