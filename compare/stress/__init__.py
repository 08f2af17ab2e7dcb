"""Stress tests of checkpoints: killed writers and damaged files."""
