"""The parts of `benchmarks/coserve.py`: one module for each group of claims."""
