"""The Wan networks: the table of variants, loading, the denoiser and its conditioning."""
