"""Batches of an epoch: loaders, what each process reads of them, and their randomness."""
