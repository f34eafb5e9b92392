"""Which parts of which wheels make up the packs of public peers, as data."""

from dataclasses import dataclass
from fnmatch import fnmatch

__all__ = ["PACKS", "Pack", "PackError", "Wheel"]


class PackError(RuntimeError):
    """A pack cannot be built, or is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One wheel of a pack.

    Attributes:
        requirement: `name==version`, as a package registry's client takes it.
        keep: Patterns of the files that are taken; `*` matches slashes as well.
        drop: Patterns of files that are left out all the same.
    """

    requirement: str
    keep: tuple[str, ...] = ("*",)
    drop: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Whether a file of the wheel belongs into the pack."""
        return any(fnmatch(path, pattern) for pattern in self.keep) and not any(
            fnmatch(path, pattern) for pattern in self.drop
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """What travels to a machine without a network in one piece.

    Attributes:
        name: Folder below `build/peers/`.
        wheels: What it is made of.
        paths: Folders inside it that go onto the import path, beside its root.
    """

    name: str
    wheels: tuple[Wheel, ...]
    paths: tuple[str, ...] = ()


_CONFIGS = "sglang/srt/layers/moe/moe_runner/triton_utils/configs/*/E=*device_name=NVIDIA_H"
_TVM_FFI = Wheel(requirement="apache-tvm-ffi==0.1.11", drop=("tvm_ffi/3rdparty/libbacktrace/*",))

PACKS = {
    pack.name: pack
    for pack in (
        Pack(
            name="sglang",
            wheels=(
                Wheel(
                    requirement="sglang==0.5.23",
                    keep=(
                        "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
                        "sglang/kernels/ops/moe/moe_align_small_numel.py",
                        "sglang/kernels/ops/moe/moe_fused_gate.py",
                        f"{_CONFIGS}[12]00*.json",
                        "*.dist-info/METADATA",
                    ),
                ),
                Wheel(
                    requirement="sglang-kernel==0.4.5",
                    keep=(
                        "sgl_kernel/sm90/common_ops.abi3.so",
                        "triton_kernels/*",
                        "*.dist-info/METADATA",
                    ),
                ),
            ),
        ),
        Pack(
            name="vllm",
            wheels=(
                Wheel(
                    requirement="vllm==0.26.0",
                    keep=(
                        "vllm/*.py",
                        "vllm/model_executor/layers/fused_moe/configs/*.json",
                        "vllm/_C_stable_libtorch.abi3.so",
                        "vllm/_moe_C_stable_libtorch.abi3.so",
                        "*.dist-info/METADATA",
                    ),
                    drop=("vllm/third_party/*/cutlass/*", "vllm/third_party/*/include/*"),
                ),
                Wheel(requirement="pydantic==2.14.3"),
                Wheel(requirement="pydantic-core==2.50.4"),
                Wheel(requirement="annotated-types==0.8.0"),
                Wheel(requirement="typing-inspection==0.4.5"),
                Wheel(requirement="msgspec==0.22.0"),
                Wheel(requirement="cachetools==8.0.1"),
                Wheel(requirement="orjson==3.13.0"),
                Wheel(requirement="pybase64==1.5.1"),
            ),
        ),
        Pack(
            name="sonic",
            wheels=(
                Wheel(requirement="sonic-moe==0.1.2.post1"),
                Wheel(requirement="quack-kernels==0.4.1"),
                Wheel(requirement="nvidia-cutlass-dsl-libs-base==4.4.2"),
                _TVM_FFI,
                Wheel(requirement="torch-c-dlpack-ext==0.1.5"),
            ),
            paths=("nvidia_cutlass_dsl/python_packages",),
        ),
        Pack(
            name="flashinfer",
            wheels=(
                Wheel(
                    requirement="flashinfer-python==0.6.14",
                    drop=("flashinfer/data/cutlass/python/*", "*/RECORD"),
                ),
                _TVM_FFI,
            ),
        ),
    )
}
"""The packs that the benchmarks know, by name."""
