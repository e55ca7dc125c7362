"""Models that the planner is shown on: small code, published shapes, all trainable."""
