"""Modules in torch and their ports: right ones, and with the bugs of `bugs.toml` wrong ones."""
