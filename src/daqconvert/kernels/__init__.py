"""Elementwise arithmetic for the CPU: compiled at first use if there is a C++ compiler, cached, and optional."""

from daqconvert.kernels.loading import library, status

__all__ = ["library", "status"]
