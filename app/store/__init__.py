"""The store: every key, every script, every retry. Nothing outside this package knows Redis."""
