"""`wan-accel plan`: what a recipe needs on a layout of GPUs, found without GPUs or weights."""
