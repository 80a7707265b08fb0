"""Scenes, partitioners, many clients in one process, experiments and the demo."""
