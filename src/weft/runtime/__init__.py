"""The executors on real devices: processes, device memory, CUDA graphs, profiler."""
