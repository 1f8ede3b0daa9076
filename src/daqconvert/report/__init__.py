"""Showing things to people: tables and progress bars; knows `spec` and `errors` alone."""
