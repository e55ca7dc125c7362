"""What is computed: Graph, Op, TensorSpec, ParameterId. Only capture.py uses torch."""
