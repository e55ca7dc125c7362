"""The executors under a virtual clock; workloads and trace readers. No torch."""
