"""The model: vision, projector, language, heads."""
