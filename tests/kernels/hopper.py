"""Compiles a Triton kernel for Hopper (sm_90) without a GPU. Not under TRITON_INTERPRET: its kernels cannot be compiled."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(kernel, signature, constants, options, aligned=()):
    """Registers, stack and local bytes (where spills go), shared memory, and tensor-core instructions of one specialisation.

    signature: argument name -> type; constants: name -> value; aligned: names whose values are multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    dots = len(re.findall(r"mma\.sync|wgmma\.mma", built.asm["ptx"]))
    return {**_resources(built.asm["cubin"]), "shared": built.metadata.shared, "tensor_core": dots}


def _resources(cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups())))
