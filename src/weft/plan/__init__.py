"""Offline decisions: plans, schedules, actions; one file per planning method. No torch."""
