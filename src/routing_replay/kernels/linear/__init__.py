"""The dense GEMM."""

from routing_replay.kernels.linear.op import ROW_BLOCK, linear, multiply_rows, suits_few_rows

__all__ = ["ROW_BLOCK", "linear", "multiply_rows", "suits_few_rows"]
