"""Limits of sizes, above any real model.

Files name models too, and a hostile one must not be able to ask for a table of any size; with
these, the number of bytes of every tensor fits in 64 bits.
"""

MAX_SIZE, MAX_IMAGE_SIZE, MAX_PATCHES = 1 << 24, 1 << 16, 1 << 20
