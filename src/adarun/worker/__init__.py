"""Runs inside the user's training process. Imports nothing but the standard library, msgspec, torch, events and errors."""
