"""The data side beside webdataset, Energon, litdata and mosaic-streaming, in one run: `python -m tools.bench_data`."""
