"""From prompts to scored episodes."""
