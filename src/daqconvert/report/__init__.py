"""Showing things to people: tables, pictures, progress bars, the page of a run; knows `spec` and `errors` alone."""
