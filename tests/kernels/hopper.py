"""Compile a Triton kernel for Hopper (sm_90) without a GPU; not under TRITON_INTERPRET, whose kernels cannot be compiled."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(kernel, signature, constants, options, aligned=()):
    """Registers, stack and local bytes (where spills go), shared memory, tensor-core instructions, loads of single bytes, and how
    a warp lies on the tiles that are loaded in 32-bit words.

    signature: argument name -> type; constants: name -> value; aligned: names whose values are multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    dots = len(re.findall(r"mma\.sync|wgmma\.mma", built.asm["ptx"]))
    byte_loads = len(re.findall(r"ld\.global\S*\.[bu]8", built.asm["ptx"]))
    return {
        **_resources(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "tensor_core": dots,
        "byte_loads": byte_loads,
        "lanes": _lanes(built.asm["ttgir"]),
    }


def _lanes(ttgir):
    """Threads a warp has along each dimension of the two-dimensional 32-bit integer loads."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{.*?threadsPerWarp = (\[[\d, ]+\])", ttgir, re.MULTILINE))
    used = set(re.findall(r"tt\.load .*tensor<\d+x\d\d+x!tt\.ptr<i32>, (#\w+)>", ttgir))
    return sorted(layouts[name] for name in used)


def _resources(cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups())))
