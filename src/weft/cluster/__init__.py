"""What it runs on: Device, Link, Cluster. No torch."""
