"""Benchmarks: each prints what it measured beside what it compares with, from one run (README.md here)."""
