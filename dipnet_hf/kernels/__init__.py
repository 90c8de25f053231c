"""Triton versions of tensor functions elsewhere in the library, imported only where they run."""
