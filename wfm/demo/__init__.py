"""The demonstration: 13 raster scans of NASA's IRIS spectrograph through a three-step pipeline.

`wfm.demo.calibrate`, `wfm.demo.linefit` and `wfm.demo.map` stand for anybody's reduction software: they know the
container contract (`wfm.demo.contract`) and nothing else of wfm. `wfm.demo.data` brings the data.
"""
