"""Compiles every Triton kernel as its caller launches it, for a GPU that need not be here.

``python triton_kernels.py CAPABILITY ...``, with TRITON_DUMP_PTXAS_LOG=1 and an empty cache, prints
each kernel's name and target, and what ptxas says of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from beft_ext.ops import triton_bias_adamw_step as adamw, triton_bias_grad_stats as stats

INTS = (
    "tokens",
    "width",
    "stride_b",
    "stride_t",
    "stride",
    "batch",
    "chunks",
    "elements",
    "tensor_count",
    "block_count",
)
KINDS = {
    **dict.fromkeys(INTS, "i32"),
    **dict.fromkeys(("example_offsets", "tensors", "blocks", "first_blocks"), "*i64"),
    "scale": "fp32",
}

Variant = tuple[str, Any, dict[str, Any], dict[str, str], dict[str, Any]]


def variants() -> Iterator[Variant]:
    """Name, kernel, constants, kinds of arguments that vary, options of the launch."""
    wide = {"BLOCK_H": stats.MAX_BLOCK_H}
    for dtype in ("fp32", "bf16", "fp16"):
        for layout, absent in (("padded", {"example_offsets": None}), ("packed", {})):
            yield (
                f"partial_sums_kernel {dtype} {layout}",
                stats.partial_sums_kernel,
                {"stride_h": 1, "BLOCK_T": stats.BLOCK_T, **wide, **absent},
                {"grad_output": f"*{dtype}"},
                {"num_warps": 8, "enable_fp_fusion": False},
            )
    options = {"num_warps": 8, "enable_fp_fusion": False}
    tile = {"GROUPS": stats.GROUPS, "COLUMNS": stats.COLUMNS}
    yield "finish_columns_kernel", stats.finish_columns_kernel, tile, {}, options
    for out in ("fp32", "bf16"):
        kinds = {"out": f"*{out}"}
        yield f"finish_rows_kernel {out}", stats.finish_rows_kernel, tile, kinds, options
    for kernel in (adamw.norm_kernel, adamw.step_kernel, adamw.finish_kernel):
        sizes = {"BLOCK": adamw.BLOCK, "SLOTS": adamw.SLOTS}
        constants = {k: v for k, v in sizes.items() if k in kernel.arg_names}
        yield f"adamw {kernel.__name__}", kernel, constants, {}, options | {"num_warps": 4}


def signature(kernel: Any, constants: Mapping[str, Any], kinds: Mapping[str, str]) -> dict:
    known = {**KINDS, **kinds, **dict.fromkeys(constants, "constexpr")}
    return {name: known.get(name, "*fp32") for name in kernel.arg_names}


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    for name, kernel, constants, kinds, options in variants():
        print(f"kernel {name} for sm_{capability}:", flush=True)
        source = ASTSource(kernel, signature(kernel, constants, kinds), constexprs=constants)
        triton.compile(source, target=target, options=options)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(int(each))
