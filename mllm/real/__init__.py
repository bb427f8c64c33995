"""Trains and tests on small real weights and real recordings, which come as packages.

Nothing of it is vendored: every file is found in an installed package, or fetched by Debian's package client, and is
checked against its SHA-256 before it is used.
"""
