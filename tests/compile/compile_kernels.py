"""Compile the examples of every Triton kernel for several GPUs, on a machine that needs none.

Run as a program, so that it can be given another Triton through PYTHONPATH. Prints one JSON object.
"""

import importlib
import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import routing_replay

ARCHITECTURES = (80, 90, 100)


def kernel_modules() -> list[str]:
    root = Path(routing_replay.__file__).parent
    paths = sorted((root / "kernels").rglob("_triton*.py"))
    return [
        ".".join(("routing_replay", *path.relative_to(root).with_suffix("").parts))
        for path in paths
    ]


def main() -> None:
    compiled: dict[str, int] = {}
    for module_name in kernel_modules():
        cases = importlib.import_module(module_name).compile_cases()
        if not cases:
            sys.exit(
                f"{module_name}.compile_cases() is empty; give one case for each launched variant"
            )
        for name, kernel, signature, constexprs in cases:
            types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
            ordered = {argument: types[argument] for argument in kernel.arg_names}
            for arch in ARCHITECTURES:
                source = ASTSource(fn=kernel, signature=ordered, constexprs=constexprs)
                binary = triton.compile(source, target=GPUTarget("cuda", arch, 32))
                compiled[f"{module_name}:{name}:sm_{arch}"] = len(binary.asm["cubin"])
    print(json.dumps({"triton": triton.__version__, "compiled": compiled}))


if __name__ == "__main__":
    main()
