"""`python -m gpu_engine.tools` is the `gpu-engine` command."""

from gpu_engine.tools.cli import main

main()
