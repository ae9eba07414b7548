"""Benchmarks: the conventional way against this repository's, on the same data, in the same run.

`make bench` runs all, `python -m bench.<name>` one. See bench/README.md.
"""
