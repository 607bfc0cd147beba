"""Compile every launch table entry of roi_views for sm_90 and print its resource use, one JSON line per entry.

Run by test_kernels_sm90.py. Arguments: patterns of the names wanted; all without any.
"""

import itertools
import json
import re
import sys

import torch
from hopper import compiled
from l2r2_kernels.roi_views import triton as launch
from l2r2_kernels.roi_views import triton_backward, triton_forward, triton_pil, triton_place, triton_uint8

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
POINTERS = {
    "table": "*i64", "mask_table": "*i64", "index": "*i64", "order": "*i64", "starts": "*i64", "record": "*i64",
    "norm": "*fp32", "boxes": "*fp32", "valid_out": "*u8", "coefficients": "*i32", "first": "*i32", "first_of": "*i32",
    "sums": "*i32", "grad": "*fp32", "grad_in": "*fp32",
}  # fmt: skip
INTEGERS = re.compile(r"stride_|out_|grad_[vcyx]|n_images|batch_[hw]|columns|height|width")


def argument_type(name, kernel, images, out):
    if name in ("images", "out"):
        return images if name == "images" else out
    if name in POINTERS:
        return POINTERS[name]
    if INTEGERS.match(name) or (name.startswith("fill") and kernel is triton_pil.pil_forward):
        return "i32"
    return "fp32"


def usage(kernel, settings, images, out):
    constants = {k: v for k, v in settings.items() if k not in OPTIONS}
    signature = {name: argument_type(name, kernel, images, out) for name in kernel.arg_names}
    return compiled(kernel, signature, constants, {k: v for k, v in settings.items() if k in OPTIONS})


def entries():
    """(name, kernel, settings, image type, out type) of everything the launchers can choose."""
    size = {"OUT_H": 224, "OUT_W": 224}
    for kind in (0, 1):
        for pixel, mixed, masked, half, ratio in itertools.product((3, 1), *[(False, True)] * 3, (2.24, 9.0, 18.0)):
            config = launch.uint8_config(half, kind, masked, mixed, ratio, pixel)
            flags = {"KIND": kind, "PIXEL": pixel, "MASKED": masked, "ASM": True}
            name = f"uint8 kind={kind} pixel={pixel} mixed={mixed} masked={masked} half={half} ratio={ratio}"
            yield name, triton_uint8.forward_uint8, {**size, **flags, **config}, "*u8", "*bf16" if half else "*fp32"
        for pixel, mixed, masked in itertools.product((3, 1), (False, True), (False, True)):
            flags = {"OUT": 224, "KIND": kind, "TAPS": 8 << kind, "PIXEL": pixel, "MASKED": masked, "ASM": True}
            name = f"pil kind={kind} pixel={pixel} mixed={mixed} masked={masked}"
            yield name, triton_pil.pil_forward, {**flags, **launch.pil_config(masked, mixed, pixel)}, "*u8", "*bf16"
        flags = {"OUT": 224, "KIND": kind, "TAPS": 8 << kind, "RAGGED": 6}
        yield f"pil_prepare kind={kind}", triton_pil.pil_prepare, {**flags, **launch.PREPARE}, "*u8", "*bf16"
    for kind in range(4):
        for masked, dtype in itertools.product((False, True), (torch.uint8, torch.bfloat16, torch.float32)):
            if kind < 2 and dtype == torch.uint8:
                continue
            config = launch.general_config(dtype, kind, masked, True)
            images, out = ("*u8", "*bf16") if dtype == torch.uint8 else ("*fp32", "*bf16")
            name = f"general kind={kind} masked={masked} images={str(dtype)[6:]}"
            yield name, triton_forward.forward, {**size, "KIND": kind, "MASKED": masked, **config}, images, out
        for masked in (False, True):
            config = launch.backward_config(kind, masked)
            name = f"backward kind={kind} masked={masked}"
            yield name, triton_backward.backward, {**size, "KIND": kind, "MASKED": masked, **config}, "*fp32", "*fp32"
        flags = {"KIND": kind, "RAGGED": 6, "SQUARE": True}
        yield f"prepare kind={kind}", triton_place.prepare, {**size, **flags, **launch.PREPARE}, "*u8", "*bf16"


if __name__ == "__main__":
    for name, kernel, settings, images, out in entries():
        if len(sys.argv) == 1 or any(re.fullmatch(wanted, name) for wanted in sys.argv[1:]):
            result = {"name": name, "dots": "prepare" not in name, **usage(kernel, settings, images, out)}
            print(json.dumps(result), flush=True)
