"""Compiles every tile of the GPU's tables for the GPUs that a person names, and lists those that do not fit.

python -m benchmarks.gpu_tiles 80 90 100
"""

from __future__ import annotations

import sys

from gpu_engine.gpu.tile_filter import rejected

if __name__ == "__main__":
    lines = list(rejected(map(int, sys.argv[1:] or ["90"])))
    print("\n".join(lines) or "all tiles fit")
    sys.exit(bool(lines))
