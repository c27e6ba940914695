"""Computes a checksum per delivery on both ends, in the same pass as the copy where possible."""
