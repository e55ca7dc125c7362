"""Small definitions of branchy models for the planner and the trainer."""
