"""One SAE trained by several processes: rows shared out, latents shared out, or both."""
