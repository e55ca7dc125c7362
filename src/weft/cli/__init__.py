"""Verbs; each parses, calls one function of a lower room, prints."""
