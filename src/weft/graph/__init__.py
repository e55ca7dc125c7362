"""What is computed: Graph, Op, TensorSpec, ParameterId, series-parallel tree. Only capture.py uses torch."""
