"""The CPU kernels in C: their sources, the compiler's driver and the backend that calls them."""
