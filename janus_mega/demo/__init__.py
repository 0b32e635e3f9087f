"""The digits demo: a small real job that walks the whole house in one command."""
