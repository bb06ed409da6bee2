"""Encoders that turn captions, images and videos into cached tensors."""
