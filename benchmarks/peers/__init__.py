"""Engines under measurement: one worker module each, run in that engine's own interpreter."""
