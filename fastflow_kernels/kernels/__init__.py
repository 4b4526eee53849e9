"""Triton kernels. Importing this package imports no Triton; importing ``kernels.coupling`` does."""
