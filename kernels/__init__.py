"""Tensor operations of the method: region transport and the asymmetric loss."""
