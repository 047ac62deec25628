"""Benchmarks: each prints what it measured, beside what it compares with, from one run. See README.md in this folder."""
