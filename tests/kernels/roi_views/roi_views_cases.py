"""Images, boxes and comparisons shared by the roi_views tests."""

import torch
import torch.nn.functional as F
from l2r2_kernels.roi_views import reference
from l2r2_kernels.roi_views.spec import make_spec
from PIL import Image

torch.set_num_threads(1)  # small tensors: threads only get in each other's way
FILL = (124, 116, 104)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAN = float("nan")
# levels of 255 against float64, by output dtype (KERNELS.md)
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.35, torch.bfloat16: 0.8}


def noise_image(height, width, seed, hwc=False):
    """Half hard 0 / 255 edges, half smooth noise: the worst case for rounding and the usual one."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    image[:, :, : width // 2] = torch.where(image[:, :, : width // 2] > 127, 255, 0).to(torch.uint8)
    return image.permute(1, 2, 0).contiguous() if hwc else image


def spec_of(images, **settings):
    """The Spec that the public function would make."""
    full = {
        "size": 224, "margin": 0.0, "square": True, "fill": FILL, "interpolation": "bilinear", "antialias": True, "mode": "float",
        "mean": None, "std": None, "scale": None, "dtype": torch.float32, "memory_format": torch.contiguous_format,
    }  # fmt: skip
    first = images if isinstance(images, torch.Tensor) else images[0]
    return make_spec(is_uint8=first.dtype == torch.uint8, **{**full, **settings})


def truth(images, boxes, image_index=None, masks=None, **settings):
    """The float64 reference on the CPU, not rounded to the output dtype."""
    settings.pop("backend", None)
    spec = spec_of(images, **{**settings, "dtype": torch.float64})
    images = [image.cpu() for image in images]
    index = torch.arange(len(images)) if image_index is None else image_index.cpu()
    masks = [None if m is None else m.cpu() for m in masks] if masks else [None] * len(boxes)
    return reference.forward(images, boxes.cpu(), index, masks, spec)


def levels_apart(views, expected, std=None):
    """Largest difference in levels of 255, normalisation undone."""
    assert views.shape == expected.shape
    scale = torch.tensor(std or (1.0, 1.0, 1.0), dtype=torch.float64)[:, None, None] * 255
    difference = (views.detach().cpu().double() - expected.double()).abs() * scale
    assert not difference.isnan().any()
    return difference.max().item() if difference.numel() else 0.0


def canvas_of(image, box, fill, square=True, mask=None):
    """Padded canvas [3, H, W] of an integer box, written the long way round."""
    image = image if image.shape[0] == 3 else image.permute(2, 0, 1)
    x0, y0, x1, y1 = box
    color = torch.tensor(fill, dtype=image.dtype)[:, None, None]
    if mask is not None:
        image = torch.where(mask != 0, image, color)
    crop = image[:, y0:y1, x0:x1]
    if not square:
        return crop
    height, width = crop.shape[1:]
    side = max(height, width)
    canvas = color.expand(3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    canvas[:, top : top + height, left : left + width] = crop
    return canvas


def interpolate(canvas, size, interpolation="bilinear", antialias=True):
    return F.interpolate(canvas.double()[None], size=size, mode=interpolation, antialias=antialias)[0]


def pillow(canvas, size, interpolation="bilinear"):
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    resized = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy()).resize((size, size), how)
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1)
