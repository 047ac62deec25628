"""Builds the native kernels now, rather than when the first instance starts: `python -m shared.engine.native`."""

import sys

from shared.engine.native.build import built_library, find_compiler


def main() -> None:
    path = built_library()
    reason = "could not be built" if find_compiler() else "need a C++ compiler (g++)"
    told = f"native kernels: {path}" if path else f"native kernels {reason}; torch's own operators serve, more slowly"
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main()
