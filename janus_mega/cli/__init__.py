"""The command `janus-mega`: parse, build, call. No logic."""
