"""Image loading: any image file becomes an upright 8-bit RGB image, or raises one clear error.

Everything that opens an image calls `load_image` or makes a `LazyImage`, so that boxes always refer to the same pixels. A path
may go through a shard, see `shards`.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from . import shards
from .errors import L2R2Error
from .io import MAX_BYTES, check_readable

FILL = (124, 116, 104)  # ImageNet's mean color, RGB levels 0-255
MAX_PIXELS = 100_000_000  # largest image that is decoded; 300 MB as RGB
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif")
)
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
# Pillow decodes only the formats of the suffixes above, because some others run programs (EPS starts Ghostscript).
SCALED = ("JPEG", "MPO")  # formats that can be decoded at 1/2, 1/4 or 1/8 of their size
ORIENTATION, MOVED, TURNED = 0x0112, range(2, 9), range(5, 9)  # the EXIF tag, its values that move pixels, and exchange sides
EXIF_IFD, TIME_ORIGINAL, SUBSECOND, TIME = 0x8769, 0x9003, 0x9291, 0x0132  # EXIF tags
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor


class ImageError(L2R2Error):
    """An image that cannot be used; the message starts with the file's name."""


def load_image(
    source: ImageSource,
    *,
    fill: Sequence[int] = FILL,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Open an image as upright 8-bit RGB.

    EXIF orientation is applied, 16-bit images are rescaled to 8 bits (not clipped), transparent pixels are composited on `fill`,
    and an animation yields its first frame. The size is checked before anything is decoded.

    Args:
        source: path, encoded bytes, binary file object, PIL image, or pixels as a uint8 array or tensor `[H, W, 3]` or `[H, W]`.
        fill: RGB color (0-255) under transparent pixels.
        max_pixels: maximum width * height; Pillow's own limit (179 million) applies as well.
        name: name of the image in error messages; defaults to the path.

    Raises:
        ImageError: when the file is missing, empty, truncated, too large, or not an image.
        TypeError: when the source is none of these types.

    >>> load_image(np.zeros((2, 3), dtype=np.uint8)).size
    (3, 2)
    """
    name = name or _name_of(source)
    with _one_sentence(name, max_pixels):
        return _decoded(_opened(_read(source), name, max_pixels), name, fill, ours=not isinstance(source, Image.Image))


class LazyImage:
    """An image with a known upright size, whose pixels are decoded on request, at full or reduced resolution, by one thread.

    Takes the arguments of `load_image` and raises the same exceptions, on creation or in `load`.

    Attributes:
        size: `(height, width)` of the upright image in pixels.

    >>> LazyImage(np.zeros((20, 30), dtype=np.uint8)).load(2).size
    (15, 10)
    """

    def __init__(
        self, source: ImageSource, *, fill: Sequence[int] = FILL, max_pixels: int = MAX_PIXELS, name: str | None = None
    ) -> None:
        self.name, self.fill, self.max_pixels = name or _name_of(source), fill, max_pixels
        self._decoded: Image.Image | None = None
        self._opened: Image.Image | None = None  # for the first call of `load`
        self._by_torchvision = False
        with _one_sentence(self.name, max_pixels):
            readable = _read(source)
            self._encoded = b"" if isinstance(readable, Image.Image) else _bytes(readable, self.name)
            image = _opened(self._encoded or readable, self.name, max_pixels)
            if self._encoded and image.format in SCALED:
                orientation = _orientation(image)
                self.size = (image.width, image.height) if orientation in TURNED else (image.height, image.width)
                self._by_torchvision = image.format == "JPEG" and image.mode == "RGB" and orientation not in MOVED
                self._opened = image
                return
            self._decoded = _decoded(image, self.name, fill, ours=not isinstance(source, Image.Image))
        self._encoded = b""
        self.size = (self._decoded.height, self._decoded.width)

    def load(self, scale: int = 1) -> Image.Image:
        """Decode as upright 8-bit RGB.

        Args:
            scale: factor to reduce by: 1, 2, 4 or 8. JPEG files are reduced in the discrete cosine transform, other images by
                averaging. The last row and column may cover fewer pixels.
        """
        if self._decoded is not None:
            return self._decoded if scale == 1 else self._decoded.reduce(scale)
        with _one_sentence(self.name, self.max_pixels):
            image, self._opened = self._opened or _opened(self._encoded, self.name, self.max_pixels), None
            width, height = image.size
            # turning a reduced image would move a last row or column that covers fewer pixels to the front
            whole_cells = _orientation(image) == 1 or not (width % scale or height % scale)
            drafted = scale > 1 and whole_cells and min(width, height) >= scale
            if drafted:
                image.draft(None, (width // scale, height // scale))
            decoded = _decoded(image, self.name, self.fill, ours=True)
            return decoded if drafted or scale == 1 else decoded.reduce(scale)

    def pixels(self, scale: int = 1) -> Tensor:
        """Decode as `load` does, to uint8 `[H, W, 3]`.

        Upright RGB JPEGs at full size are decoded by torchvision: faster, and equal up to rounding between builds of libjpeg.
        It prints a warning to stderr for a damaged file that it can decode.
        """
        if scale == 1 and self._by_torchvision:
            from torchvision.io import ImageReadMode, decode_jpeg

            data = torch.frombuffer(bytearray(self._encoded), dtype=torch.uint8)
            with suppress(RuntimeError, AttributeError):  # Pillow decodes damaged files, or says why not
                decoded: Tensor = decode_jpeg(data, ImageReadMode.RGB)
                return decoded.permute(1, 2, 0)
        return image_tensor(self.load(scale))


@contextmanager
def _one_sentence(name: str, max_pixels: int) -> Iterator[None]:
    """Convert the exceptions of decoders to ImageError."""
    try:
        with _Quiet():
            yield
    except (ImageError, TypeError):
        raise
    except Image.DecompressionBombError:
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow refuses above twice MAX_IMAGE_PIXELS
        raise ImageError(f"{name}: has more pixels than the limit of {limit:,}; make it smaller first.") from None
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        raise ImageError(f"{name}: cannot be decoded ({_one_line(error)}); the file is damaged or truncated.") from error


def _name_of(source: ImageSource) -> str:
    return str(source) if isinstance(source, (str, Path)) else "image"


def _opened(source: str | Path | bytes | Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Open an image without decoding it, and check its size."""
    image = source if isinstance(source, Image.Image) else _open(_bytes(source, name), name)
    _check_size(image, name, max_pixels)
    return image


def _decoded(image: Image.Image, name: str, fill: Sequence[int], ours: bool) -> Image.Image:
    """Return the upright RGB image, which is a copy unless the image is `ours`."""
    scale = _grey_scale(image)
    image.load()
    if ours:
        with suppress(Exception):  # malformed EXIF gives no orientation, but the pixels are fine
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, tuple(fill), name, scale)
    upright = image
    with suppress(Exception):
        upright = ImageOps.exif_transpose(image)
    return _to_rgb(upright.copy() if upright is image else upright, tuple(fill), name, scale)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # malformed EXIF gives no orientation, as in `_decoded`
        return 1


def taken_at(path: str | Path) -> float | None:
    """Return when a photo was taken by its EXIF data, in seconds since 1970 on the camera's clock; None if it does not say."""
    try:
        packed = shards.read(path)
        with _Quiet(), Image.open(path if packed is None else io.BytesIO(packed), formats=_formats()) as image:
            exif = image.getexif()
            details = exif.get_ifd(EXIF_IFD)
            text = str(details.get(TIME_ORIGINAL) or exif.get(TIME) or "").strip("\0 ")
            part = str(details.get(SUBSECOND) or "").strip("\0 ")
        moment = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    except Exception:  # unreadable files and malformed EXIF have no time
        return None
    return moment + (float(f"0.{part}") if part.isdecimal() else 0.0)


def load_mask(path: str | Path, image_size: tuple[int, int]) -> Tensor:
    """Load a mask file as `[H, W]` bool, True where it is brighter than half; an all-black file is an empty mask.

    Args:
        path: the mask file.
        image_size: `(height, width)` that the mask must have.

    Raises:
        ImageError: when the file is unreadable, of another size, or not black but dark throughout (e.g. saved as 0 and 1).
    """
    gray = np.asarray(load_image(path).convert("L"))
    if gray.shape != image_size:
        raise ImageError(
            f"{path}: the mask is {gray.shape[1]}x{gray.shape[0]}, but its image is {image_size[1]}x{image_size[0]}."
        )
    if 0 < gray.max() <= 127:
        raise ImageError(f"{path}: the mask's brightest level is {gray.max()}; save the object as white (255) on black.")
    return torch.from_numpy(gray > 127)


def image_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a uint8 tensor `[H, W, 3]`.

    >>> image_tensor(Image.new("RGB", (4, 2))).shape
    torch.Size([2, 4, 3])
    """
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def list_images(sources: Iterable[str | Path]) -> list[Path]:
    """List the image files in `sources`, in order; folders are searched recursively and sorted, hidden files are skipped.

    A file that is named explicitly is kept whatever its suffix, so that a bad one is reported rather than ignored.

    Raises:
        ImageError: when a source does not exist, or a folder contains no image.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(p for p in source.rglob("*") if is_image_path(p.relative_to(source)) and p.is_file())
            if not inside:
                raise ImageError(f"{source}: no image in this folder (looked for {' '.join(sorted(IMAGE_SUFFIXES))}).")
            found += inside
        elif source.exists() or shards.state_of(source) is not None:
            found.append(source)
        else:
            raise ImageError(f"{source}: no such file or folder.")
    return list(dict.fromkeys(found))


def is_image_path(path: Path) -> bool:
    """Whether a relative path has an image suffix and no hidden part.

    >>> is_image_path(Path("a/b.JPG")), is_image_path(Path(".cache/b.jpg"))
    (True, False)
    """
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") and part != ".." for part in path.parts)


class _Quiet:
    """Suppress Pillow's warnings, which are about sizes that our own limit refuses and about malformed EXIF.

    Threads that load at the same time share one `catch_warnings`; with one each, a thread would restore the filters of another
    and could silence warnings in the whole process.
    """

    lock = threading.Lock()
    inside = 0
    filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with _Quiet.lock:
            if _Quiet.inside == 0:
                _Quiet.filters = warnings.catch_warnings()
                _Quiet.filters.__enter__()
                warnings.simplefilter("ignore")
            _Quiet.inside += 1

    def __exit__(self, *error: object) -> None:
        with _Quiet.lock:
            _Quiet.inside -= 1
            if _Quiet.inside == 0:
                _Quiet.filters.__exit__(None, None, None)


def _read(source: ImageSource) -> str | Path | bytes | Image.Image:
    """Convert the source to one of the types that `_opened` takes.

    Raises:
        TypeError: when that is not possible.
    """
    if isinstance(source, (str, Path, bytes, Image.Image)):
        return source
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (np.ndarray, Tensor)):
        pixels = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
            kind = f"{pixels.dtype} {list(pixels.shape)}"
            raise TypeError(f"Pixels of an image must be uint8 [H, W, 3] or [H, W], got {kind}.")
        return Image.fromarray(np.ascontiguousarray(pixels))
    if callable(getattr(source, "read", None)) and isinstance(data := source.read(MAX_BYTES + 1), bytes):
        if len(data) > MAX_BYTES:
            raise ImageError(f"image: is larger than the limit of {MAX_BYTES / 2**20:,.0f} MB; use a smaller file.")
        return data
    raise TypeError(
        "An image must be a path, bytes, a binary file, a PIL image, or a uint8 array or tensor [H, W, 3], "
        f"got {type(source).__name__}."
    )


def _bytes(source: str | Path | bytes, name: str) -> bytes:
    """Return the content of a file, or of an image in a shard; raises if it is empty."""
    if isinstance(source, (str, Path)):
        try:
            packed = shards.read(source)
            if packed is None:
                check_readable(source)
            source = Path(source).read_bytes() if packed is None else packed
        except L2R2Error as error:
            raise ImageError(str(error)) from None
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file.") from None
        except IsADirectoryError:
            raise ImageError(f"{name}: is a folder, not an image.") from None
        except (OSError, ValueError) as error:
            raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', error)}).") from error
    if not source:
        raise ImageError(f"{name}: is empty (0 bytes).")
    return source


def _open(source: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(source), formats=_formats())
    except UnidentifiedImageError:
        kind = "a ZIP archive" if source[:2] == b"PK" else "not an image in a supported format"
        raise ImageError(f"{name}: is {kind}.") from None


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # Pillow opens some by the plugin of another


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} = {width * height:,} pixels, more than the limit of {max_pixels:,}; make it smaller first."
        )
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width}x{height}).")


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """Return the white level of an image with more than 8 bits, and whether 0 is white; Pillow keeps TIFF levels as stored."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    return (2**bits - 1 if 8 < bits < 16 else 65535), tags.get(PHOTOMETRIC) == 0


def _to_rgb(image: Image.Image, fill: tuple[int, ...], name: str, scale: tuple[int, bool]) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return Image.fromarray(_eight_bit(np.asarray(image), name, *scale)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*fill, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(pixels: np.ndarray, name: str, white: int, inverted: bool) -> np.ndarray:
    """Rescale grayscale to 8 bits by the range of its format, not of its content, so that images stay comparable."""
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ImageError(f"{name}: is a floating-point image with values outside [0, 1]; save it as 8 or 16 bit.")
        levels: np.ndarray = np.rint(pixels * 255).astype(np.uint8)
    elif pixels.min() < 0 or pixels.max() > white:
        raise ImageError(f"{name}: has gray levels outside 0 to {white}; save it as 8 or 16 bit.")
    else:
        levels = ((pixels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return 255 - levels if inverted else levels


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
