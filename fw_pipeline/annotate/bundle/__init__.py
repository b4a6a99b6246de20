"""Cameras, lens and points from tracks, by bundle adjustment from many starts."""
