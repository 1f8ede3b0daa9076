"""Elementwise arithmetic for the CPU, compiled at first use where a C++ compiler is, cached, and optional."""

from daqconvert.kernels.loading import library, status

__all__ = ["library", "status"]
