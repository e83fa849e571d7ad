"""Suites: what is drawn to measure a method, who judges it, and the table it ends in."""
