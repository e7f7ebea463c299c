"""Matrix kernels for NVIDIA GPUs: CUDA C++ compiled at run time, and Triton for the others."""
