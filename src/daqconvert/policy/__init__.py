"""Deciding which layer gets which bits: a `Policy` in, a `Plan` out; knows `spec` and `errors` alone."""
