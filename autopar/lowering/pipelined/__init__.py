"""Scans over layers as scans over ticks, in which every stage of a pipeline works on another microbatch."""
