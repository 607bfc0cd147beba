"""Compiles the kernels for Hopper without a GPU and prints, as JSON lines, what came out.

Run by ``test_masked_attention_sm90.py`` in a process without TRITON_INTERPRET. Arguments: dtype:head_dim:typical ...
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from l2r2_kernels.masked_attention import triton as attention
from l2r2_kernels.masked_attention import triton_rows as rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {"forward": attention.forward_kernel, "dq": attention.dq_kernel, "dkv": attention.dkv_kernel}
POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "LENGTHS": "*i32", "INDEX": "*i32", "COUNT": "*i32", "MASK": "*u8"}
NUMBERS = {"B", "H", "T", "NUM", "TAIL", "N", "C", "ROWS", "stride"}


def types(kernel, dtype, constants):
    """Signature as a launch would infer it; pointers and strides divisible by 16, as PyTorch's are."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS or re.fullmatch("s[qkvo][bth]", name):
            signature[name] = "i32"
        elif name.startswith("scale") or name == "fill":
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}")
        if signature[name].startswith("*") or name == "stride" or re.fullmatch("s[qkvo][bth]", name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, attributes


def resources(cubin):
    """Registers and stack bytes (what spills takes room there) of the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])}


def build(kernel, dtype, constants, num_warps, num_stages):
    signature, attributes = types(kernel, dtype, constants)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    tensor_core = {"wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync")}
    return resources(built.asm["cubin"]) | tensor_core | {"shared": built.metadata.shared}


def main():
    for request in sys.argv[1:]:
        dtype, dim, typical = request.split(":")
        block_d = max(16, triton.next_power_of_2(int(dim)))
        table = attention.configs(block_d, 2 if dtype.endswith("16") else 4, int(typical))
        for name, kernel in KERNELS.items():
            for varlen in (True, False):
                tile = table[name]
                constants = {"D": int(dim), "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
                constants |= {"VARLEN": varlen, "UPCAST": False, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
                result = build(kernel, dtype.replace("tf32", "fp32"), constants, tile.num_warps, tile.num_stages)
                print(json.dumps({"request": request, "kernel": name, "varlen": varlen} | result))
    for kernel, constants in ((rows.key_index_kernel, {"BLOCK": 256}), (rows.take_rows_kernel, {"BLOCK_R": 16, "BLOCK_C": 256})):
        print(json.dumps({"request": "rows", "kernel": kernel.__name__} | build(kernel, "bf16", constants, 4, 3)))


if __name__ == "__main__":
    main()
