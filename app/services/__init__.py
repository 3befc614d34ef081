"""The use cases: check with the rules, call the store, log, return."""
