"""Errors, units, clock, memory ledger, metric and trace sinks. No torch."""
