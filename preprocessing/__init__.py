"""Raw videos of people in, a `wan-accel/clips@1` dataset out."""
