"""Partition-protocol sweeps: their trials, how they run, what they show and what they will take."""
