"""Crash it, corrupt it: what checkpoints survive."""
