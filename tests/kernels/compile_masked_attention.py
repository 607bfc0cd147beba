"""Compile the attention kernels for sm_90 and print their resource use, one JSON line per kernel.

Run by test_kernels_sm90.py. Arguments: dtype:head_dim:typical ...
"""

import json
import re
import sys

import triton
from hopper import compiled
from l2r2_kernels.masked_attention import triton as attention
from l2r2_kernels.masked_attention import triton_rows as rows

KERNELS = {"forward": attention.forward_kernel, "dq": attention.dq_kernel, "dkv": attention.dkv_kernel}
POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "LENGTHS": "*i32", "INDEX": "*i32", "COUNT": "*i32", "MASK": "*u8"}
NUMBERS = {"B", "H", "T", "NUM", "TAIL", "N", "C", "ROWS"}


def types(kernel, dtype):
    """Signature as a launch would infer it; pointers and strides divisible by 16, as PyTorch's are."""
    signature, aligned = {}, []
    for name in kernel.arg_names:
        stride = name == "stride" or re.fullmatch("s[qkvo][bth]", name)
        if name in NUMBERS or stride:
            signature[name] = "i32"
        elif name.startswith("scale") or name == "fill":
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}")
        if signature[name].startswith("*") or stride:
            aligned.append(name)
    return signature, aligned


def usage(kernel, dtype, constants, num_warps, num_stages):
    signature, aligned = types(kernel, dtype)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return compiled(kernel, signature, constants, options, aligned)


def entries(request):
    """(name, kernel, dtype, constants, warps, stages) of the three kernels in both forms."""
    dtype, dim, typical = request.split(":")
    block_d = max(16, triton.next_power_of_2(int(dim)))
    for name, kernel in KERNELS.items():
        for varlen in (True, False):
            tile = attention.configs(block_d, 2 if dtype.endswith("16") else 4, int(typical), varlen)[name]
            constants = {"D": int(dim), "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            constants |= {"VARLEN": varlen, "UPCAST": False, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
            yield f"{request} {name} varlen={varlen}", kernel, dtype.replace("tf32", "fp32"), constants, *tile[2:]


def main():
    for request in sys.argv[1:]:
        for name, *entry in entries(request):  # IEEE float32 dots use no tensor core
            print(json.dumps({"name": name, "dots": not request.startswith("fp32"), **usage(*entry)}), flush=True)
    for kernel, constants in ((rows.key_index_kernel, {"BLOCK": 256}), (rows.take_rows_kernel, {"BLOCK_R": 16, "BLOCK_C": 256})):
        print(json.dumps({"name": kernel.__name__, "dots": False, **usage(kernel, "bf16", constants, 4, 3)}))


if __name__ == "__main__":
    main()
