"""What single latents are: their contexts, statistics, neighbours, descriptions and pages."""
