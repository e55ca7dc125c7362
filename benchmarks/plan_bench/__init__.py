"""The parts of `benchmarks/plan.py`: one module for each group of claims."""
