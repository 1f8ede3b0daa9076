"""Networks that the benchmarks train and that no library ships."""
