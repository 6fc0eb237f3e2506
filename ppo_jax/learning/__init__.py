"""From scored episodes to new parameters."""
