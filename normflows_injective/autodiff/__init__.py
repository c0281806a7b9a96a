"""Torch made to give Jacobian products of whole batches."""
