"""Trainer events in, Lens calls out: one module a framework."""
