"""What transformers meets: the only room that imports it for caching."""
