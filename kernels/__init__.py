"""Tensor operations of the method: region transport and the asymmetric loss, on Triton where it can run."""

from fedmpt.kernels.dispatch import asymmetric_loss, gated_asymmetric_loss, region_transport

__all__ = ["asymmetric_loss", "gated_asymmetric_loss", "region_transport"]
