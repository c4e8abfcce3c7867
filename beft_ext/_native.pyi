from collections.abc import Sequence

from torch import Tensor

from beft_ext.ops.bias_adamw_tables import AdamWTables

has_cuda: bool
interface: int
bias_adamw_step_limits: tuple[int, int]

def survey(params: list[Tensor], /) -> tuple[list[Tensor | None], bytes, bytes, bytes | None]: ...
def cuda_refusal() -> str: ...
def bias_grad_stats_arguments(
    grad_output: Tensor, offsets: Tensor | None, sum: Tensor, sum_sq: Tensor, /
) -> tuple[int, ...] | None: ...
def bias_example_grads_arguments(
    grad_output: Tensor, offsets: Tensor | None, out: Tensor, /
) -> tuple[int, ...] | None: ...
def bias_grad_stats_cpu(
    data: int,
    dtype: int,
    batch: int,
    tokens: int,
    width: int,
    stride_b: int,
    stride_t: int,
    stride_h: int,
    offsets: int,
    scale: float,
    threads: int,
    grad: int,
    sum: int,
    sum_sq: int,
    /,
) -> bool: ...
def bias_grad_stats_cuda(
    data: int,
    dtype: int,
    batch: int,
    tokens: int,
    width: int,
    stride_b: int,
    stride_t: int,
    stride_h: int,
    offsets: int,
    chunks: int,
    scale: float,
    workspace: int,
    grad: int,
    sum: int,
    sum_sq: int,
    stream: int,
    /,
) -> None: ...
def bias_example_grads_cpu(
    data: int,
    dtype: int,
    batch: int,
    tokens: int,
    width: int,
    stride_b: int,
    stride_t: int,
    stride_h: int,
    offsets: int,
    scale: float,
    threads: int,
    out: int,
    out_dtype: int,
    out_stride: int,
    /,
) -> bool: ...
def bias_example_grads_cuda(
    data: int,
    dtype: int,
    batch: int,
    tokens: int,
    width: int,
    stride_b: int,
    stride_t: int,
    stride_h: int,
    offsets: int,
    chunks: int,
    scale: float,
    workspace: int,
    out: int,
    out_dtype: int,
    out_stride: int,
    stream: int,
    /,
) -> None: ...
def bias_adamw_step_gather(
    arguments: AdamWTables, longest: int, /
) -> tuple[bytes, bytes, bytes] | None: ...
def bias_adamw_step_cpu(
    params: bytes,
    grads: bytes,
    forms: bytes,
    groups: Sequence[float],
    blocks: Tensor,
    state: Tensor,
    steps: Tensor,
    scores: Tensor,
    max_grad_norm: float,
    global_norm: float,
    inverse_scale: float,
    threads: int,
    /,
) -> float: ...
def bias_adamw_step_cuda(
    params: bytes,
    grads: bytes,
    forms: bytes,
    groups: Sequence[float],
    blocks: int,
    block_count: int,
    first_blocks: int,
    segments: int,
    state: int,
    elements: int,
    steps: int,
    scores: int,
    workspace: int,
    norm: int,
    lr: int,
    max_grad_norm: float,
    global_norm: int,
    grad_scale: int,
    found_inf: int,
    stream: int,
    /,
) -> None: ...
