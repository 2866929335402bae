"""What bench/speed/gpu.py does, one idea a file. Nothing here imports triton, and everything runs on a CPU too."""
