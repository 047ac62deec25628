"""Kernels in C++, compiled for this very processor where there is a compiler; without one, torch's operators serve.

The functions take plain pointers, so the sources need neither torch's headers nor Python's, and compile in seconds.
"""
