"""Sums up cells."""
