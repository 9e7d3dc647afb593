"""What can be measured of a model: one file per measure, which says its unit.

parameters  bytes  macs  memory  resident  latency  accuracy  difference
"""
