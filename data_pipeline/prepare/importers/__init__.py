"""Formats that raw input comes in, one a file; each gives records that can be read from anywhere."""
