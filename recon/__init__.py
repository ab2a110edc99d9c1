"""k-space to trusted image: values, Fourier, coil maps, reconstruction and the scan simulator.

Pure: arrays in, arrays out (NumPy or CuPy, following the input). No sockets, files, clock, settings or logging.
"""
