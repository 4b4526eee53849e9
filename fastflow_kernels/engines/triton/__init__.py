"""The Triton kernels. Importing this package imports no Triton; its modules do."""
