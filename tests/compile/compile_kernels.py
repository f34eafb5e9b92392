"""Compile the examples of every Triton kernel for the GPUs that are named, on a machine that needs none.

Run as a program, so that it can be given another Triton through PYTHONPATH: `compile_kernels.py 80 90 100`. Prints one JSON
object.
"""

import importlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import routing_replay


def kernel_modules(pattern: str) -> list[str]:
    root = Path(routing_replay.__file__).parent
    paths = sorted((root / "kernels").rglob(pattern))
    return [
        ".".join(("routing_replay", *path.relative_to(root).with_suffix("").parts))
        for path in paths
    ]


def compile_for_hopper(module_name: str) -> dict[str, int]:
    """Gluon names the instructions of one GPU."""
    compiled: dict[str, int] = {}
    for name, kernel, signature, constexprs, warps in importlib.import_module(
        module_name
    ).compile_cases():
        types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        ordered = {argument: types[argument] for argument in kernel.arg_names}
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(ordered.values())
            if kind.startswith("*")
        }
        binary = triton.compile(
            GluonASTSource(kernel, ordered, constexprs, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
        compiled[f"{module_name}:{name}:sm_90"] = len(binary.asm["cubin"])
    return compiled


def compile_module(module_name: str, architectures: list[int]) -> dict[str, int]:
    cases = importlib.import_module(module_name).compile_cases()
    if not cases:
        sys.exit(f"{module_name}.compile_cases() is empty; give one case for each launched variant")
    compiled: dict[str, int] = {}
    for name, kernel, signature, constexprs in cases:
        types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        ordered = {argument: types[argument] for argument in kernel.arg_names}
        for arch in architectures:
            source = ASTSource(fn=kernel, signature=ordered, constexprs=constexprs)
            binary = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            compiled[f"{module_name}:{name}:sm_{arch}"] = len(binary.asm["cubin"])
    return compiled


def main() -> None:
    architectures = [int(word) for word in sys.argv[1:]]
    compiled: dict[str, int] = {}
    with ProcessPoolExecutor(max_workers=2) as pool:
        parts = [pool.submit(compile_for_hopper, name) for name in kernel_modules("_hopper*.py")]
        parts += [
            pool.submit(compile_module, name, [arch])
            for name in kernel_modules("_triton*.py")
            for arch in architectures
        ]
        for part in parts:
            compiled.update(part.result())
    print(json.dumps({"triton": triton.__version__, "compiled": compiled}))


if __name__ == "__main__":
    main()
