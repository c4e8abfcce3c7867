from typing import Any

from torch import Tensor

has_cuda: bool
bias_adamw_limits: tuple[int, int]

def addresses(tensors: list[Tensor | None]) -> bytes: ...
def gradients(params: list[Tensor]) -> tuple[list[Tensor | None], bytes | None]: ...
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
def bias_adamw_cpu(*args: Any) -> float: ...
def bias_adamw_cuda(*args: Any) -> None: ...
