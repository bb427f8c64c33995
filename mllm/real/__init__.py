"""Small real weights and real recordings that come as packages, and the demo that trains on them.

Nothing of it is vendored: every file is found in an installed package, or fetched by Debian's package client, and is
checked against its SHA-256 before it is used.
"""
