"""The search for a schedule: its settings, its loop, its checkpoints."""
