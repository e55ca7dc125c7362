"""Adapters: their weights, their files, and applying them beside the frozen model."""
