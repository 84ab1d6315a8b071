"""Spanlock: credentials for AI agents that live exactly as long as the work they are for."""

__version__ = "0.1.0"
