"""Freeze a PostgreSQL database for as long as a snapshot takes, and never longer."""

__version__ = "0.1.0"
