"""Ratchet: run a vision-language-action model on an arm and let it improve between sessions."""

__version__ = "0.1.0"
